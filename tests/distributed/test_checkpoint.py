"""Checkpoints reshard: what one layout saves any other continues, to the last bits of fp64."""

import pytest
import torch

from gpt4lib.distributed import checkpoint
from gpt4lib.distributed.data import AdamW
from gpt4lib.distributed.launch import launch
from gpt4lib.distributed.trainer import Trainer
from gpt4lib.nn.transformer import Transformer
from gpt4lib.specs import ModelSpec
from gpt4lib.specs.workload import ParallelPlan as Plan

# 37 rows of the vocabulary are padded, gated experts are cut in two blocks, one key/value head is shared
SPEC = ModelSpec("small", n_layers=4, d_model=16, n_heads=4, n_kv_heads=1, d_ff=24, vocab_size=37, context=16, n_experts=4,
                 top_k=2, gated_ffn=True)
ALONE = Plan(micro_batch=4, n_micro_batches=2)
CHAIN = [Plan(tp=2, micro_batch=4, n_micro_batches=2), Plan(pp=2, dp=2, zero_stage=1, micro_batch=2, n_micro_batches=2),
         ALONE,
         Plan(dp=2, zero_stage=3, micro_batch=2, n_micro_batches=2),
         Plan(dp=2, ep=2, zero_stage=1, micro_batch=2, n_micro_batches=2),
         Plan(tp=2, pp=2, n_chunks=2, micro_batch=4, n_micro_batches=2)]


def losses(plan, first, stop, folder=None, spec=SPEC, keep=2):
    """Steps first..stop of the one run, continued from the folder unless it is the start, and saved there."""
    trainer = Trainer(spec, plan, 8, dtype=torch.float64, balance=0.01, adamw=AdamW(lr=1e-2), bucket_bytes=4000)
    if first:
        checkpoint.load(checkpoint.latest(folder), trainer)
        assert trainer.steps == first
    out = []
    for i in range(first, stop):
        rows = torch.randint(0, 37, (plan.global_batch, 9), generator=torch.Generator().manual_seed(i))
        out.append(trainer.step(rows)[1])
        if folder and i + 1 < stop:
            checkpoint.save(folder, trainer, keep)
    if folder:
        checkpoint.save(folder, trainer, keep)
    return out


def close(got, expected):
    return torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64),
                                      rtol=0, atol=1e-12)          # fp64: only the order of sums differs


def test_every_layout_continues_what_another_saved(tmp_path):
    """A step in each of six layouts, handed on through the disk: loss, balance and norm of the run that never stopped."""
    whole, pieces = launch(1, losses, ALONE, 0, len(CHAIN) + 1)[0], []
    for i, plan in enumerate(CHAIN):
        pieces += launch(plan.n_devices, losses, plan, i, i + 1, tmp_path)[0]
    pieces += launch(1, losses, ALONE, len(CHAIN), len(CHAIN) + 1, tmp_path)[0]
    close(pieces, whole)
    assert len({round(step.loss, 6) for step in whole}) == len(whole)                            # it did learn in between


def logits_after(folder):
    trainer = Trainer(SPEC, ALONE, 8, dtype=torch.float64)
    checkpoint.load(checkpoint.latest(folder), trainer)
    with torch.no_grad():
        return trainer.stages[0](torch.arange(8)[None])


def test_a_single_process_reads_the_weights(tmp_path):
    """Saved by tp 2 x pp 2, read without a process group: the logits of the model that training continues with."""
    launch(4, losses, Plan(tp=2, pp=2, micro_batch=4, n_micro_batches=2), 0, 2, tmp_path)
    model = checkpoint.read(checkpoint.latest(tmp_path), Transformer(SPEC, seed=1).double())
    with torch.no_grad():
        got, fresh = model(torch.arange(8)[None]), Transformer(SPEC).double()(torch.arange(8)[None])
    torch.testing.assert_close(got, launch(1, logits_after, tmp_path)[0], rtol=0, atol=1e-12)
    assert (got - fresh).abs().max() > 1e-3


def test_the_same_layout_continues_bit_for_bit_and_keep_prunes(tmp_path):
    plan = Plan(tp=2, micro_batch=4, n_micro_batches=2)
    whole = launch(2, losses, plan, 0, 4)
    for stop, keep, left in ((2, 2, [1, 2]), (4, 1, [4])):
        got = launch(2, losses, plan, stop - 2, stop, tmp_path, SPEC, keep)
        assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{n:08d}" for n in left]
    assert got == [ranks[2:] for ranks in whole]


def test_a_wrong_model_is_one_line(tmp_path):
    launch(1, losses, ALONE, 0, 1, tmp_path)
    where = checkpoint.latest(tmp_path)
    words = r"weight holds embedding.weight of shape \(37, 16\), the model has shape \(38, 16\)"
    with pytest.raises(ValueError, match=words) as error:
        checkpoint.read(where, Transformer(SPEC.with_(vocab_size=38)))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="weight holds no layers.0.attention.query.bias, the model has shape"):
        checkpoint.read(where, Transformer(SPEC.with_(qkv_bias=True)))
    with pytest.raises(RuntimeError, match=r"ValueError: .* the model has shape \(40, 16\); resume with the model that was"):
        launch(2, losses, Plan(tp=2, micro_batch=4, n_micro_batches=2), 1, 2, tmp_path, SPEC.with_(vocab_size=40))


def test_only_complete_checkpoints_count(tmp_path):
    for name in ("step-00000002", "step-00000010", "step-00000011.partial", "step-00000012.old.partial", "step-13", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path).name == "step-00000010" and checkpoint.steps_of(checkpoint.latest(tmp_path)) == 10
    assert checkpoint.latest(tmp_path / "notes") is checkpoint.latest(tmp_path / "nowhere") is None
