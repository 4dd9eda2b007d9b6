// Calculators: every <form class="calculator"> computes its <output data-formula="...">
// from its named inputs. The formulas are plain arithmetic, valid in JavaScript and in Python:
// a test evaluates the very same strings against gpt4lib.
(() => {
  const units = [[1e15, "P"], [1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];
  const show = (x, as) => {
    if (!Number.isFinite(x)) return "–";
    if (as === "percent") return (100 * x).toFixed(1) + " %";
    const [size, unit] = units.find(([size]) => Math.abs(x) >= size) || [1, ""];
    return (x / size).toPrecision(4) + " " + (as === "bytes" ? unit.replace("B", "G") + "B" : unit);
  };
  const connect = (form) => {
    const inputs = [...form.querySelectorAll("input[name]")];
    const names = inputs.map((input) => input.name);
    const outputs = [...form.querySelectorAll("output[data-formula]")].map((output) =>
      [output, new Function(...names, `return ${output.dataset.formula};`)]);
    const update = () => {
      const values = inputs.map((input) => Number(input.value));
      const ok = inputs.every((input) => input.checkValidity());
      for (const [output, formula] of outputs)
        output.textContent = ok ? show(formula(...values), output.dataset.as) : "check the inputs";
    };
    const preset = form.querySelector("select");
    preset?.addEventListener("change", () => {
      for (const [name, value] of Object.entries(JSON.parse(preset.value))) form.elements[name].value = value;
      update();
    });
    form.addEventListener("input", (event) => { if (event.target !== preset) update(); });
    form.addEventListener("submit", (event) => event.preventDefault());
    update();
  };
  const start = () => document.querySelectorAll("form.calculator").forEach(connect);
  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", start) : start();
})();
