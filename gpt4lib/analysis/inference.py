"""Serving: the least time one decode step can take, and what many clients of an engine see, pay for and burn."""

from typing import NamedTuple

from gpt4lib.analysis import cost, flops, memory, roofline
from gpt4lib.analysis.parameters import parameters
from gpt4lib.analysis.serving_estimator import ServingEstimator, Step
from gpt4lib.specs import DeviceSpec, ModelSpec, ParallelPlan, dtype_bytes
from gpt4lib.specs.checks import positive, require


def weights_read(spec: ModelSpec, batch):
    """Parameters a decode step of `batch` tokens reads: all that is shared, and distinct experts.

    The embedding is a look-up of `batch` rows and is left out; a tied table is read once, as the
    head. batch may be an array.
    """
    count = parameters(spec)
    touched = (roofline.distinct_experts(spec.n_experts, spec.top_k, batch) / spec.n_experts if spec.is_moe else 0)
    looked_up = count.by_part["positions"] + (0 if spec.tied else count.by_part["embedding"])
    return count.total - looked_up - (1 - touched) * count.by_part["experts"]


def decode_bytes(spec: ModelSpec, batch, context, dtype: str = "bf16", kv_dtype: str = "bf16", tp: int = 1):
    """Bytes one step of `batch` sequences reads on one of tp ranks.

    Its share of the weights, and its KV cache once, at the context it has now; the states of linear
    layers are read and written back. batch and context may be arrays.
    """
    cache = memory.kv_cache_bytes(spec, batch, context, kv_dtype, tp)
    state = 2 * memory.linear_state_bytes(spec, batch, tp=tp)
    return weights_read(spec, batch) * dtype_bytes(dtype) / tp + cache + state


def decode_step(spec: ModelSpec, device: DeviceSpec, plan: ParallelPlan, batch: int, context: int,
                dtype: str = "bf16", kv_dtype: str = "bf16") -> roofline.Time:
    """Roofline of one new token for each of `batch` sequences of one replica; no communication.

    Tensor parallelism divides it. Pipeline stages work one after the other, so pp leaves the
    latency of a token as it is and multiplies how many batches are under way: each stage is free
    again after 1/pp of it.
    """
    plan.check(spec)
    flop = flops.decode(spec, batch, context, absorbed=spec.latent is not None).total / plan.tp
    moved = decode_bytes(spec, batch, context, dtype, kv_dtype, plan.tp)
    return roofline.time(device, dtype, flop, moved)


class Service(NamedTuple):
    """What `clients` see of one replica, each sending its next request when the last is answered."""
    ttft_seconds: float              # to the first token, with the wait for a place
    tpot_seconds: float              # a token after it, with the prompts read between
    tokens_per_second: float         # output of the replica
    running: float                   # requests at a time; the other clients wait
    decode: Step                     # a step without a prompt
    prompt_seconds: float            # of the replica, for each prompt
    output_seconds: float            # of the replica, for each output token

    def dollars_per_1k(self, n_devices: int, dollars_per_device_hour: float, utilisation: float = 1.0, *,
                       input_len: int = 0) -> float:
        """Of output tokens; of input tokens if their number a prompt is given. `utilisation` is the share of the time sold."""
        require(0 < utilisation <= 1, f"utilisation={utilisation!r} is not accepted; give a fraction above 0 and up to 1")
        a_token = self.prompt_seconds / input_len if input_len else self.output_seconds
        return cost.dollars_per_1k_tokens(n_devices, dollars_per_device_hour, utilisation / a_token)


def _each(estimator: ServingEstimator, batch) -> float:
    """Sequences in each of the batches that fill a pipeline; one is not cut."""
    return max(batch / estimator.plan.pp, min(batch, 1))


def _held(estimator: ServingEstimator, step: Step) -> float:
    """How long a step keeps the next one waiting: a pipeline is free again after a stage's turn."""
    return step.seconds if estimator.plan.pp == 1 else step.turn


def _decode(estimator: ServingEstimator, batch, context) -> tuple[Step, float]:
    """A step of the batches that fill a pipeline, and the seconds between two tokens: a batch comes round when every stage has
    had its turn with every batch."""
    step = estimator.step(_each(estimator, batch), context)
    return step, max(step.seconds, estimator.plan.pp * step.turn)


def static(estimator: ServingEstimator, batch, input_len, output_len) -> tuple[float, float]:
    """(prefill, whole) seconds of a batch that starts and ends together."""
    step, one = estimator.step(0, 0, batch * input_len), estimator.step(0, 0, input_len)
    prefill = step.seconds - step.terms.prompt + batch * one.terms.prompt
    return prefill, prefill + (output_len - 1) * _decode(estimator, batch, input_len + output_len / 2)[1]


def under_load(estimator: ServingEstimator, clients, input_len, output_len) -> Service:
    """A replica with in-flight batching and a fixed number of clients.

    While a request decodes, each of the others that run begins anew once, and its prompt is read in between; the share
    `prompt_wait` of these prompts is read before one's own instead. What has no room waits for a place: a request's time
    for every `running` ahead of it (Little 1961).
    """
    positive("clients", clients)
    k, context = estimator.efficiency, input_len + output_len / 2
    running = min(clients, max(estimator.largest_batch(context), 1.0))
    step, decode = _decode(estimator, running, context)
    own, mixed = estimator.prefill(input_len), estimator.step(_each(estimator, running), context, input_len)
    prompt = _held(estimator, mixed) - _held(estimator, step)
    others, wait = max(running - 1, 0), estimator.engine.prompt_wait
    tpot = decode + (1 - wait) * others * prompt / output_len
    ttft = (k.request_seconds + own.seconds * k.prompt_turns + _held(estimator, own) * wait * others
            + estimator.engine.admission_steps * decode)
    request = own.seconds + output_len * tpot
    ttft += (clients - running) / running * request
    return Service(ttft, tpot, clients * output_len / (ttft + (output_len - 1) * tpot), running, step, prompt, decode / running)


class Pools(NamedTuple):
    """Prompts read by some replicas and answers decoded by others."""
    ttft_seconds: float              # reading, and sending the cache to where it is decoded
    tpot_seconds: float
    tokens_per_second: float         # of one decoding replica
    prefill_replicas: float          # that keep one decoding replica busy
    running: float                   # requests at a time on a decoding replica


def disaggregated(prefill: ServingEstimator, decode: ServingEstimator, clients, input_len, output_len) -> Pools:
    """Two pools of one model, so that no prompt interrupts a decoding request. Zhong et al. 2024, DistServe, arXiv:2401.09670.

    `clients` run on a decoding replica; each rank of a prefilling one sends its share of the cache over the network.
    """
    k, context = prefill.efficiency, input_len + output_len / 2
    running = min(clients, max(decode.largest_batch(context), 1.0))
    tpot, own = _decode(decode, running, context)[1], prefill.prefill(input_len)
    moved = max(w.cache[0] * input_len + w.cache[1] * min(input_len, prefill.window) + w.state / 2 for w in prefill.works)
    rate = running / tpot
    return Pools(k.request_seconds + own.seconds + moved / prefill.network + decode.engine.admission_steps * tpot, tpot, rate,
                 rate / output_len * _held(prefill, own), running)
