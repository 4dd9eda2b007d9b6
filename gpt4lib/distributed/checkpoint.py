"""Checkpoints of a training run, by torch.distributed.checkpoint: saved from any layout, loaded into any other.

On disk every parameter is one whole tensor under the model's own name, written in pieces by the ranks that hold them: the
fp32 weights in one folder, the moments in two others, one after the other to spare the host's memory. A step is complete or
absent: it is written beside and then renamed.
"""

import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import planner, planner_helpers
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties

from gpt4lib.distributed.data import KINDS
from gpt4lib.distributed.layout import Piece, window
from gpt4lib.distributed.trainer import Trainer
from gpt4lib.nn.transformer import Transformer
from gpt4lib.specs.checks import require

COMPLETE = re.compile(r"step-(\d{8})")


class _Boxes:
    """Which boxes of a whole tensor the local one consists of: the part that saving and loading share."""

    def __init__(self, pieces: dict[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def boxes(self, key: str) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in self.pieces[key].chunks()]

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        box = next(c for c in self.pieces[index.fqn].chunks() if c.offsets == tuple(index.offset))
        return window(self.state_dict[index.fqn], box.local, box.sizes)

    lookup_object = lookup_tensor


class _Save(_Boxes, dcp.DefaultSavePlanner):
    def create_local_plan(self) -> planner.SavePlan:
        items = []
        for key, tensor in self.state_dict.items():
            shape = torch.Size(self.pieces[key].shape)
            for where in self.boxes(key):
                data = planner.TensorWriteData(where, TensorProperties.create_from_tensor(tensor), shape)
                items.append(planner.WriteItem(MetadataIndex(key, where.offsets), planner.WriteItemType.SHARD, tensor_data=data))
        self.plan = planner.SavePlan(items)
        return self.plan


class _Load(_Boxes, dcp.DefaultLoadPlanner):
    def create_local_plan(self) -> planner.LoadPlan:
        held = self.metadata.state_dict_metadata
        return planner.LoadPlan([item for key in self.state_dict for item in
                                 planner_helpers.create_read_items_for_chunk_list(key, held[key], self.boxes(key))])


def complete(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a folder, by their steps."""
    return sorted(p for p in Path(folder).glob("step-*") if COMPLETE.fullmatch(p.name))


def latest(folder: str | Path) -> Path | None:
    """The complete checkpoint of the most steps, None if there is none."""
    return next(reversed(complete(folder)), None)


def steps_of(path: Path) -> int:
    """After how many steps it was written; ValueError for a folder of another name."""
    name = COMPLETE.fullmatch(path.name)
    require(name, f"{path} is not a checkpoint; give a folder named step-NNNNNNNN, as `latest` does")
    return int(name[1])


def save(folder: str | Path, trainer: Trainer, keep: int = 2) -> Path:
    """Write the state after `trainer.steps` steps; collective. All ranks have to see the same `folder`.

    Killed at any moment it leaves the earlier checkpoints as they were. Only the newest `keep` stay. ValueError if the folder
    holds a later step: it is another run's.
    """
    target = Path(folder) / f"step-{trainer.steps:08d}"
    if (last := latest(folder)) and steps_of(last) > trainer.steps:
        raise ValueError(f"{folder} holds {last.name}, later than step {trainer.steps}; give another folder, or remove it")
    require(keep >= 1, f"keep={keep} is not accepted; give an integer >= 1")
    partial = target.with_name(target.name + ".partial")
    if dist.get_rank() == 0:
        for old in Path(folder).glob("step-*.partial"):             # what a killed save left
            shutil.rmtree(old)
    dist.barrier()
    for kind in KINDS:
        writer = dcp.FileSystemWriter(partial / kind)
        dcp.save(trainer.optimizer.state(kind), storage_writer=writer, planner=_Save(trainer.pieces))
    if dist.get_rank() == 0:
        aside = target.with_name(target.name + ".old.partial")
        if target.exists():
            target.rename(aside)                                    # half removed it would still look complete
        partial.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def _check(metadata: Metadata, wanted: dict[str, tuple[int, ...]], path: Path) -> None:
    for key, shape in wanted.items():
        held = metadata.state_dict_metadata.get(key)
        if held is None or tuple(held.size) != tuple(shape):
            raise ValueError(f"{path} holds {'no ' + key if held is None else f'{key} of shape {tuple(held.size)}'}, the model "
                             f"has shape {tuple(shape)}; resume with the model that was saved, or give another folder")


def load(path: str | Path, trainer: Trainer) -> None:
    """Continue from a complete checkpoint, whatever layout wrote it; collective.

    ValueError, one line, if the model is another one.
    """
    path, pieces = Path(path), trainer.pieces
    steps = steps_of(path)
    wide = torch.promote_types(next(trainer.stages[0].parameters()).dtype, torch.float32)
    for kind in KINDS:
        reader = dcp.FileSystemReader(path / kind)
        _check(reader.read_metadata(), {name: p.shape for name, p in pieces.items()}, path / kind)
        state = {name: torch.zeros(p.local_shape, dtype=wide) for name, p in pieces.items()}
        dcp.load(state, storage_reader=reader, planner=_Load(pieces))
        trainer.optimizer.load(kind, state, steps)
    trainer.steps = steps


def read(path: str | Path, model: Transformer) -> Transformer:
    """The weights of a checkpoint into a model on one process, which needs no process group."""
    path = Path(path) / "weight"
    state = {name: p.detach() for name, p in model.named_parameters()}
    reader = dcp.FileSystemReader(path)
    _check(reader.read_metadata(), {key: tuple(t.shape) for key, t in state.items()}, path)
    with warnings.catch_warnings(action="ignore"):                  # that one process is enough is what we want
        dcp.load(state, storage_reader=reader, no_dist=True)
    return model
