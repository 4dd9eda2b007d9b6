"""Hugging Face checkpoints in safetensors, read into our model and written from it.

One table serves both directions: for each tensor of theirs, the pieces of ours it is made of. Pickles are refused:
loading one can run any code.
"""

import json
import re
from dataclasses import astuple
from itertools import chain, count
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple

import torch
from torch import Tensor

from gpt4lib.nn.numerics import Llama3Rope, Numerics
from gpt4lib.nn.transformer import Transformer
from gpt4lib.specs import ModelSpec, huggingface, registry
from gpt4lib.specs.checks import positive, require

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD = re.compile(r"model\d*-\d{5}-of-\d{5}\.safetensors")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")        # buffers that old versions stored

NAMES = registry.read("gpt4lib.nn", "checkpoint.toml")        # theirs -> ours
FAMILIES = NAMES["families"]
GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# the fields of Llama3Rope in a config's words
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Entry(NamedTuple):
    """One of their tensors: views of our parameters stacked along rows, and whether they store it transposed."""
    name: str
    parts: tuple[Tensor, ...]
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(len(p) for p in self.parts), *self.parts[0].shape[1:]
        return rows[::-1] if self.transposed else rows

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)

    def stored(self) -> Tensor:
        """A copy as they store it."""
        whole = torch.cat(self.parts)
        return (whole.t() if self.transposed else whole).contiguous()


def layout(model: Transformer, family: str) -> list[Entry]:
    """Every tensor of a checkpoint of this family, as views into the model's parameters."""
    ours = {name: p.detach() for name, p in model.named_parameters()}
    entries = []
    for layer in range(model.spec.n_layers):
        for theirs, stems in NAMES[FAMILIES[family]["names"]].items():
            if layer and "{i}" not in theirs:
                continue
            for kind in (".weight", ".bias"):
                names = [s.format(i=layer) + kind for s in stems.split("+")]
                if names[0] in ours:
                    conv = family == "gpt2" and ".c_" in theirs and kind == ".weight"        # their Conv1D: [in, out]
                    entries.append(Entry(theirs.format(i=layer) + kind, tuple(ours.pop(n) for n in names), conv))
        stacked = [f"layers.{layer}.moe.experts.{w}" for w in ("w_in", "w_out")]
        if stacked[0] in ours and family == "mixtral":
            for e, (w_in, w_out) in enumerate(zip(*(ours.pop(n) for n in stacked))):
                for w, part in zip(("w1", "w3", "w2"), (*w_in.chunk(2), w_out)):
                    entries.append(Entry(f"model.layers.{layer}.block_sparse_moe.experts.{e}.{w}.weight", (part,), False))
    if ours:
        raise ValueError(f"{model.spec.name}: {min(ours)} has no place in a {family} checkpoint")
    return entries


# --- reading -------------------------------------------------------------------------------------------------
def numerics_of(config: Mapping[str, Any]) -> Numerics:
    """The numbers behind the counts; ValueError for what would be computed differently there."""
    family = config["model_type"]
    known = {"rope_theta": 10_000.0, **FAMILIES[family], **config}
    llama = FAMILIES[family]["names"] == "llama"
    activation = known["hidden_act" if llama else "activation_function"]
    accepted = ("silu",) if llama else tuple(GELUS)
    where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"      # the old name wins in transformers too
    rope = config.get(where) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{family} config: {where}={rope!r} is not accepted; give an object with 'rope_type', or null")
    rope = {"rope_theta": known["rope_theta"], "original_max_position_embeddings": known.get("max_position_embeddings"), **rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    for bad, what in ((activation not in accepted, f"activation {activation!r}; accepted: {', '.join(accepted)}"),
                      (kind not in ("default", "llama3"), f"rope_type {kind!r}; accepted: default, llama3"),
                      (config.get("scale_attn_by_inverse_layer_idx"), "scale_attn_by_inverse_layer_idx=true; accepted: false"),
                      (not config.get("scale_attn_weights", True), "scale_attn_weights=false; accepted: true"),
                      (config.get("add_cross_attention"), "add_cross_attention=true; accepted: false"),
                      (not config.get("multi_query", True), "multi_query=false; accepted: true")):
        require(not bad, f"{family} config: this model does not compute {what}")
    eps = "rms_norm_eps" if llama else "layer_norm_epsilon"
    try:
        llama3 = [positive(key, rope.get(key)) for key in LLAMA3_KEYS] if kind == "llama3" else []
        base = float(positive("rope_theta", rope["rope_theta"]))
        return Numerics(positive(eps, known[eps]), base, GELUS.get(activation, "none"), Llama3Rope(*llama3) if llama3 else None)
    except ValueError as e:
        raise ValueError(f"{family} config: {e}") from None


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it, from the index or from the one file there is; errors name the file."""
    from safetensors import SafetensorError, safe_open
    index = folder / INDEX
    if index.exists():
        try:
            names = json.loads(index.read_text("utf8"))["weight_map"].items()
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{index} is not an index: it must be JSON with a 'weight_map'") from None
        files = {name: folder / str(file) for name, file in names}
    else:
        files = {"": folder / SINGLE}
    held: dict[str, Path] = {}
    for file in sorted(set(files.values())):
        if file.parent != folder or not file.is_file():
            pickles = sorted(p.name for p in folder.glob("*.bin"))
            hint = f"; {pickles[0]} is a pickle, which can run code and is refused" if pickles else ""
            raise ValueError(f"{file} is not there{hint}; give a folder with {SINGLE} or all shards of {INDEX}")
        try:
            with safe_open(file, "pt") as opened:
                names = opened.keys()
        except SafetensorError as e:
            raise ValueError(f"{file} is not a whole safetensors file ({e}); it may be truncated, fetch it again") from None
        if twice := sorted(set(names) & set(held)):
            raise ValueError(f"tensor {twice[0]!r} is held twice, by {held[twice[0]]} and {file.name}; delete it from one")
        held |= dict.fromkeys(names, file)
    if absent := sorted(name for name, file in files.items() if name and held.get(name) != file):
        raise ValueError(f"{index} places tensor {absent[0]!r} in {files[absent[0]].name}, which does not hold it")
    return held


def _tensors(held: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """One tensor at a time, file by file."""
    from safetensors import safe_open
    for file in sorted(set(held.values())):
        with safe_open(file, "pt") as opened:
            for name in (n for n, f in held.items() if f == file):
                kind = opened.get_slice(name).get_dtype()
                require(kind in FLOATS, f"tensor {name!r} in {file} is stored as {kind}; accepted: {', '.join(FLOATS)}")
                yield name, opened.get_tensor(name)


@torch.no_grad()
def load(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Transformer:
    """A model with the weights of a folder that holds config.json and safetensors, whole or in shards.

    Families: llama, mistral, mixtral, gpt_bigcode (multi-query), gpt2. Raises ValueError, one line naming the file
    and the tensor, for anything missing, unknown, of another shape, truncated or pickled.
    """
    folder, spec = Path(folder), ModelSpec.from_hf(Path(folder))
    config = json.loads((folder / "config.json").read_text("utf8"))
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} can be counted but its weights are not read; accepted: {', '.join(FAMILIES)}")
    numerics = numerics_of(config)
    held = {n: f for n, f in _files(folder).items() if not n.endswith(IGNORED)}
    with torch.device("meta"):
        model = Transformer(spec, numerics=numerics)
    model = model.to(dtype).to_empty(device=device)
    entries = {e.name: e for e in layout(model, family)}
    # Some exporters drop GPT-2's prefix, and tied heads may be stored twice.
    prefix = "transformer." if FAMILIES[family]["names"] == "gpt2" and "wte.weight" in held else ""
    named = {n if n == "lm_head.weight" else prefix + n: f for n, f in held.items()}
    missing = sorted(set(entries) - set(named))
    extra = sorted(set(named) - set(entries) - ({"lm_head.weight"} if spec.tied else set()))
    if missing or extra:
        raise ValueError(f"{folder}: tensor {(missing or extra)[0]!r} is {'missing' if missing else 'not part of this model'}"
                         f" ({len(missing)} missing, {len(extra)} unknown); is config.json of the same model?")
    head = None
    for name, stored in _tensors(held):
        if name == "lm_head.weight" and spec.tied:
            head = stored
            continue
        entry = entries[prefix + name]
        if tuple(stored.shape) != entry.shape:
            raise ValueError(f"tensor {name!r} in {held[name]} has shape {tuple(stored.shape)}; config.json wants {entry.shape}")
        stored = stored.t() if entry.transposed else stored
        for part, piece in zip(entry.parts, stored.split([len(p) for p in entry.parts])):
            part.copy_(piece)
    if head is not None and not torch.equal(head.to(dtype), model.embedding.weight.cpu()):
        raise ValueError(f"{folder}: config.json ties the head to the embedding, but 'lm_head.weight' holds other numbers")
    return model


# --- writing -------------------------------------------------------------------------------------------------
def config_of(model: Transformer) -> dict[str, Any]:
    """The config.json of a model that one of the families can express; ValueError otherwise."""
    s, numerics = model.spec, model.numerics
    if s.positions == "learned":
        family = "gpt_bigcode" if s.n_kv_heads == 1 < s.n_heads else "gpt2"
        config = dict(n_inner=s.d_ff, activation_function="gelu_pytorch_tanh" if numerics.gelu == "tanh" else "gelu",
                      layer_norm_epsilon=numerics.norm_eps, **({"multi_query": True} if family == "gpt_bigcode" else {}))
    else:
        family = "mixtral" if s.is_moe else "mistral" if s.window else "llama"
        llama3 = {} if numerics.llama3 is None else {"rope_type": "llama3", **dict(zip(LLAMA3_KEYS, astuple(numerics.llama3)))}
        config = dict(intermediate_size=s.d_expert if s.is_moe else s.d_ff, hidden_act="silu", sliding_window=s.window,
                      rms_norm_eps=numerics.norm_eps,
                      rope_parameters={"rope_theta": numerics.rope_base, "rope_type": "default", **llama3})
    looked_up = {field: entry for field, entry in huggingface.FAMILIES[family].items() if isinstance(entry, dict)}
    named = {entry["key"]: getattr(s, field) for field, entry in looked_up.items() if "key" in entry}
    config = {"model_type": family, **named, **config}
    again = ModelSpec.from_hf(config).with_(name=s.name, d_ff=s.d_ff)
    different = [f for f in s.__dataclass_fields__ if getattr(again, f) != getattr(s, f)]
    if different or numerics_of(config) != numerics:
        what = f"{different[0]}={getattr(s, different[0])!r}" if different else f"{numerics}"
        raise ValueError(f"{s.name}: a {config['model_type']} checkpoint cannot say {what}; "
                         f"accepted: what one of {', '.join(FAMILIES)} can")
    return config


def save(model: Transformer, folder: str | Path, shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and safetensors that transformers and `load` both read, in shards above `shard_bytes`.

    Everything is written beside its place, then renamed, then what it replaces is deleted: an error while writing changes
    nothing, and a process killed later leaves the old weights or the new, never some of each, as new shards take names that
    are free. Only config.json, renamed last, may then be older or newer than the weights. Copies one shard at a time.
    """
    from safetensors.torch import save_file
    folder, config = Path(folder), config_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    entries = layout(model, config["model_type"])
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    config["dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    files, texts = [SINGLE], {"config.json": config}
    if len(shards) > 1:
        choices = ([f"model{n}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
                   for n in chain([""], count(1)))
        files = next(names for names in choices if not any((folder / name).exists() for name in names))
        places = {e.name: file for file, entries in zip(files, shards) for e in entries}
        texts = {INDEX: {"metadata": {"total_size": sum(e.nbytes for e in entries)}, "weight_map": places}, **texts}
    temporary = {folder / file: folder / (file + ".tmp") for file in (*files, *texts)}
    try:
        for file, entries in zip(files, shards):
            save_file({e.name: e.stored() for e in entries}, temporary[folder / file], metadata={"format": "pt"})
        for file, text in texts.items():
            temporary[folder / file].write_text(json.dumps(text, indent=2) + "\n", "utf8")
        for place, written in temporary.items():
            written.replace(place)
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)
    # transformers prefers the single file and `load` the index, so whichever is older must go
    (folder / (SINGLE if len(shards) > 1 else INDEX)).unlink(missing_ok=True)
    for old in [p for p in folder.iterdir() if SHARD.fullmatch(p.name) and p.name not in files]:
        old.unlink()
