"""From a teacher to the start of its student, on disk: plan, refit, measure, write. The same request finds the same start again."""
from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..config import WanConfig, video_size
from ..errors import WanLiteError
from ..experts import Other
from ..files import patiently, read_json, write_json
from ..formats.card import StudentCard
from ..formats.keymap import wan_size
from ..formats.read import open_wan
from ..formats.write import write_student
from ..prompts import PromptBank
from ..roles import Role
from ..teacher import ModuleTeacher, Teacher
from ..transformer import WanLiteStudent
from .apply import plain_cut, start_student
from .blockwise import heal_blocks
from .depth import DepthChoice, greedy_depth, least_influence
from .ffn import Cuts, cut_ffn
from .gaps import refit_gaps
from .handle import StudentHandle
from .importance import ROLLOUT_STEPS, Probe, Velocity, answers, check_shape, make_probe, tokens, velocity_errors, without
from .plan import METHODS, REFITS, CompressionPlan, Method, Progress, Refit, check_depth, check_ffn_dim, check_keep, interleaved
from .report import Measured, describe
from .shelf import Shelf
from .walk import KEPT, MEMORY

log = logging.getLogger(__name__)

VERSION = 6                 # raise it when the same request would give other weights
NOTE = "start.json"
HELD_OUT = 8                # states for the report, which take no part in any choice
LEAST_STATES, MOST_STATES, DEPTH_STATES = 8, 64, 16
LEAST_HEALING, MOST_HEALING = 16, 512       # states that blocks are refitted and trained on
HEALING_ROLLOUTS = 12       # that they come from, a prompt each: of 3 prompts 48 states left a start at 47% error, of 12 at 22%
TOKENS_PER_NEURON = 8       # that the refit should see

Built = tuple[StudentHandle, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked of a teacher, checked. keep: None lets `method` choose `depth` blocks. refit: of the blocks after a gap.

    block_steps: of each block's own training.
    """
    depth: int
    ffn_dim: int
    keep: tuple[int, ...] | None
    method: Method
    refit: Refit = "none"
    block_steps: int = 0

    @classmethod
    def checked(cls, teacher: WanConfig, depth: int | None, ffn_dim: int | None, keep: tuple[int, ...] | None, method: Method,
                refit: Refit = "none", block_steps: int = 0) -> Request:
        """Raises WanLiteError on a size that the teacher cannot give, or a keep-map that is not `depth` blocks."""
        if refit not in REFITS:
            raise WanLiteError(f"The refit is {refit!r}.", f"WanLite knows {', '.join(REFITS)}.")
        ffn_dim = teacher.ffn_dim if ffn_dim is None else ffn_dim
        check_ffn_dim(ffn_dim, teacher.ffn_dim)
        if keep is not None:
            check_keep(keep, teacher.num_layers)
            if depth not in (None, len(keep)):
                raise WanLiteError(f"depth is {depth} and the keep-map has {len(keep)} blocks.", "They say the same thing twice.",
                                   "Leave one of them out.")
            depth, method = len(keep), "given"
        else:
            depth = teacher.num_layers if depth is None else depth
            check_depth(depth, teacher.num_layers)
            if method not in METHODS or method == "given":
                raise WanLiteError(f"The method is {method!r}.", f"Without a keep-map it is {', '.join(METHODS[:-2])} or {METHODS[-2]}.")
        whole = depth == teacher.num_layers             # then no block has anything to make up for
        return cls(depth=depth, ffn_dim=ffn_dim, keep=keep, method=method, refit="none" if whole else refit, block_steps=0 if whole else block_steps)

    @property
    def heals(self) -> bool:
        """Whether kept blocks are changed to make up for the removed ones."""
        return self.refit != "none" or self.block_steps > 0

    def prunes_nothing(self, teacher: WanConfig) -> bool:
        return self.depth == teacher.num_layers and self.ffn_dim == teacher.ffn_dim

    def plan(self, teacher: WanConfig, keep: tuple[int, ...]) -> CompressionPlan:
        return CompressionPlan(keep=keep, ffn_dim=self.ffn_dim, method=self.method, teacher_layers=teacher.num_layers,
                               teacher_ffn_dim=teacher.ffn_dim)


def create_student(teacher: Teacher, prompts: PromptBank | None, shape: tuple[int, int, int, int], *, depth: int | None = None,
                   ffn_dim: int | None = None, keep: tuple[int, ...] | None = None, method: Method = "spaced", refit: Refit = "none",
                   block_steps: int = 0, seed: int = 0, cfg: float = 5.0, other: Other | None = None, folder: Path) -> Generator[Progress, None, Built]:
    """Writes the start under folder/<fingerprint>, or finds it there; returns its handle and a report in plain words.

    shape: (C, T, H, W) of the videos it is meant for. depth, ffn_dim: None keeps the teacher's. Without prompts nothing is
    measured, so only interleaved or given blocks at full FFN width can be had, as they are. refit: how what the removed blocks added is
    folded into the block after each gap (see gaps.py). block_steps: steps for which, after that, each block from the first gap on is
    trained by itself to hand on what the removed ones did (see blockwise.py). other: the other one of two experts; the student is then judged on
    its own side of the boundary alone. Closing it at any yield leaves no file.
    Raises WanLiteError before any work when the request cannot be met.
    """
    request = Request.checked(teacher.config, depth, ffn_dim, keep, method, refit, block_steps)
    measures = prompts is not None and not request.prunes_nothing(teacher.config)
    _check_prompts(request, teacher.config, prompts)
    if measures:
        check_shape(teacher, shape)
        prompts = prompts.fitted(teacher.config, shape)
    probing = {"prompts": prompts.fingerprint, "shape": list(shape), "seed": seed, "cfg": cfg} if measures else None
    role = {} if other is None else {"role": asdict(other.role), "other": other.teacher.fingerprint}
    fingerprint = start_fingerprint(teacher, request, probing, role)
    if (found := _read(folder / fingerprint)) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    lock = starts_lock(folder)
    yield from _taken(lock)
    try:
        return _read(folder / fingerprint) or (yield from _make(teacher, prompts, shape, request, measures, fingerprint, seed=seed, cfg=cfg, other=other,
                                                                folder=folder))
    finally:
        lock.release()


def starts_lock(folder: Path) -> FileLock:
    """What whoever makes a start there holds meanwhile. It lies beside: in the folder there is nothing but starts."""
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def _taken(lock: FileLock) -> Generator[Progress, None, None]:
    """Waits for whoever makes a start in this folder now: it may be the same one."""
    while True:
        try:
            lock.acquire(timeout=1)
            return
        except Timeout:
            yield Progress(stage="Waiting for another start to be made", done=0, total=1)


def _make(teacher: Teacher, prompts: PromptBank | None, shape: tuple[int, int, int, int], request: Request, measures: bool, fingerprint: str, *,
          seed: int, cfg: float, other: Other | None, folder: Path) -> Generator[Progress, None, Built]:
    """Chooses, refits, measures and writes."""
    probe = None
    if other is not None:
        other.beside(teacher)               # refuses a pair that is none, whether something is measured or not
    if measures:
        probe = yield from _probed(teacher, prompts, shape, other, seed=seed, count=_states(teacher.config, request, shape) + HELD_OUT, cfg=cfg)
    with _staging(folder, fingerprint) as staging:
        plan, choice, cuts = yield from _choose(teacher, request, None if probe is None else probe[:-HELD_OUT], staging)
        healed = None
        if request.block_steps or request.refit != "none" and plan.after_gaps:
            try:
                healed = yield from _heal(teacher, prompts, shape, plan, cuts, request, staging, seed=seed, cfg=cfg, other=other)
            except torch.cuda.OutOfMemoryError as error:
                raise WanLiteError("This card's memory is too small to refit or train blocks at this size.", "", "Close what else uses the card, or lower the "
                                   "frames or the size of the LATENT that is connected here: the student can be distilled and sampled at another.") from error
        weights = _Weights(teacher, plan, cuts, healed)
        measured = Measured(asked=request.method, choice=choice, refit=request.refit, block_steps=request.block_steps)
        if probe is not None:
            measured = yield from _measure(teacher, plan, weights, probe[-HELD_OUT:], measured)
        yield Progress(stage="Writing the start", done=0, total=1)
        card = card_for(teacher, plan, shape, cfg=cfg, role=other and other.role, measured={} if measured.error is None else
                        {"start_error": measured.error, "plain_cut_error": measured.plain_cut})
        return _write(folder / fingerprint, staging / fingerprint, teacher, weights, card, measured)


def _probed(teacher: Teacher, prompts: PromptBank, shape: tuple[int, int, int, int], other: Other | None, **options: Any
            ) -> Generator[Progress, None, Probe]:
    """States of the teacher's own paths, or of both experts' on the side of the one that a student is made of; the other then makes room."""
    if other is None:
        return (yield from make_probe(teacher, prompts, shape, **options))
    probe = yield from make_probe(other.beside(teacher), prompts, shape, role=other.role, **options)
    other.teacher.release()
    return probe


def start_fingerprint(teacher: Teacher, request: Request, probing: Mapping[str, Any] | None, role: Mapping[str, Any] = {}) -> str:
    """A hash of everything that decides the start and its report."""
    told = {"version": VERSION, "teacher": teacher.fingerprint, "shift": teacher.shift, "request": asdict(request), "probe": probing, **role}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _check_prompts(request: Request, teacher: WanConfig, prompts: PromptBank | None) -> None:
    if prompts is not None:
        return
    if request.method not in ("interleaved", "given") and request.depth < teacher.num_layers:
        raise WanLiteError("There are no prompts to choose blocks by.", f"The method {request.method} watches the teacher work on prompts.",
                           "Connect prompts, choose interleaved, or type a keep-map.")
    if request.heals:
        raise WanLiteError("There are no prompts to refit or train blocks on.", "What the removed ones did shows on prompts.",
                           "Connect prompts, or leave refit at none and block_steps at 0.")
    if request.ffn_dim < teacher.ffn_dim:
        raise WanLiteError("There are no prompts to narrow the FFN by.", "Which neurons matter shows on prompts.",
                           f"Connect prompts, or keep ffn_dim at {teacher.ffn_dim}.")


def _states(teacher: WanConfig, request: Request, shape: tuple[int, int, int, int]) -> int:
    """States to choose and refit by: a few for whole blocks, enough tokens for the FFN's neurons where it is cut, within bounds."""
    if request.ffn_dim == teacher.ffn_dim:
        return DEPTH_STATES
    return min(MOST_STATES, max(LEAST_STATES, -(-TOKENS_PER_NEURON * teacher.ffn_dim // tokens(shape))))


def _choose(teacher: Teacher, request: Request, probe: Probe | None, staging: Path
            ) -> Generator[Progress, None, tuple[CompressionPlan, DepthChoice | None, Cuts | None]]:
    config, keep, choice = teacher.config, request.keep, None
    if keep is None and request.method != "interleaved" and request.depth < config.num_layers:
        if request.method == "influence":
            choice = yield from least_influence(teacher, probe[:DEPTH_STATES], request.depth)
        else:
            choice = yield from greedy_depth(teacher, probe[:DEPTH_STATES], request.depth, spaced=request.method == "spaced")
        keep = choice.keep
        if any(block in keep for block, _ in choice.removals):
            request = replace(request, method="interleaved")        # it came out better
    plan = request.plan(config, interleaved(config.num_layers, request.depth) if keep is None else keep)
    cuts = None
    if plan.ffn_dim < config.ffn_dim:
        cuts = yield from cut_ffn(teacher, probe, plan.keep, plan.ffn_dim, Shelf(staging / "ffn"))
        plan = replace(plan, ffn_kept=cuts.masks(config.ffn_dim))
    return plan, choice, cuts


@dataclass(frozen=True, kw_only=False, slots=True, eq=False)
class _Weights:
    """The start's tensors, made anew at each call: the teacher's, cut, and, healed, those that were refitted or trained since."""
    teacher: Teacher
    plan: CompressionPlan
    cuts: Cuts | None
    healed: Shelf | None = None
    size: list[int] = field(default_factory=lambda: [0, 0])

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        self.size[:] = [0, 0]
        for name, tensor in start_student(_counted(self.teacher.weights(), self.size), self.plan, self.cuts):
            yield name, tensor if self.healed is None or name not in self.healed else self.healed[name]

    @property
    def whole_blocks(self) -> bool:
        """Whether they are the teacher's own, so that it can stand in for them."""
        return self.cuts is None and self.healed is None


def _heal(teacher: Teacher, prompts: PromptBank, shape: tuple[int, int, int, int], plan: CompressionPlan, cuts: Cuts | None,
          request: Request, staging: Path, *, seed: int, cfg: float, other: Other | None) -> Generator[Progress, None, Shelf]:
    """What tensors of the start became, by their names. The cut is written first and read block by block: a 14B is never in memory as a whole."""
    size = KEPT.itemsize * tokens(shape) * teacher.config.dim
    count = max(LEAST_HEALING, min(MOST_HEALING, MEMORY // size))
    each = next((n for n in (ROLLOUT_STEPS, 4, 2) if count >= 2 * n * HEALING_ROLLOUTS), 1)
    probe = yield from _probed(teacher, prompts, shape, other, seed=seed + 1, count=count, cfg=cfg, each=each, renoised=each)
    yield Progress(stage="Writing the cut", done=0, total=1)
    config = plan.student_config(teacher.config)
    written = write_student(staging / "cut", config=config, tensors=_Weights(teacher, plan, cuts)())
    healed = Shelf(staging / "healed")
    with open_wan(written.path) as source:
        def read(name: str) -> Tensor:
            return healed[name] if name in healed else source.tensor(name)

        if request.refit != "none":
            yield from refit_gaps(teacher, read, plan, probe, request.refit, healed.put)
        if request.block_steps:
            yield from heal_blocks(teacher, read, plan, probe, request.block_steps, healed.put)
    return healed


def _measure(teacher: Teacher, plan: CompressionPlan, weights: _Weights, probe: Probe, so_far: Measured
             ) -> Generator[Progress, None, Measured]:
    """The velocity errors of the start and of the plain cut on states that took no part in the choice."""
    parts: list[Tensor] = []
    for v in answers(teacher.velocity, probe):
        parts.append(v)
        yield Progress(stage="Measuring the start", done=0, total=2)
    target, config = torch.cat(parts), plan.student_config(teacher.config)
    try:
        errors = []
        for i, tensors in enumerate((weights, lambda: plain_cut(teacher, config))):
            if weights.whole_blocks or (i and weights.cuts is None):        # whole blocks only: the teacher can stand in for the student, without a byte more
                kept = plan.keep if i == 0 else interleaved(plan.teacher_layers, len(plan.keep))
                velocity = without(teacher, set(range(plan.teacher_layers)) - set(kept))
            else:
                velocity = yield from _loaded(tensors(), config, teacher, i)
            error = 0.0
            for part in velocity_errors(velocity, probe, target):
                error += part.sum().item() / len(probe)
                yield Progress(stage="Measuring the start", done=i, total=2)
            errors.append(error)
            del velocity            # before the next one takes its place in memory
    except torch.cuda.OutOfMemoryError:
        log.warning("The student's start does not fit beside the teacher on %s; its error was not measured.", teacher.device)
        return replace(so_far, why_not=f"the start does not fit beside the teacher in the memory of {teacher.device}")
    return replace(so_far, error=errors[0], plain_cut=errors[1], states=len(probe))


def _loaded(weights: Iterator[tuple[str, Tensor]], config: WanConfig, teacher: Teacher, done: int) -> Generator[Progress, None, Velocity]:
    """The velocity of a student with these weights, on the teacher's device."""
    with torch.inference_mode(False):
        module = WanLiteStudent.from_wan(config, device="meta").requires_grad_(False)
    state: dict[str, Tensor] = {}
    for name, tensor in weights:
        with torch.inference_mode(False), torch.no_grad():
            state[name] = tensor.to(teacher.device, copy=True)
        yield Progress(stage="Measuring the start", done=done, total=2)
    with torch.inference_mode(False), torch.no_grad():
        computed = state["blocks.0.self_attn.q.weight"].dtype           # a forward computes in one dtype; a teacher may hold several
        module.load_state_dict({name: tensor.to(computed) for name, tensor in state.items()}, assign=True)
        return ModuleTeacher(module, shift=teacher.shift).velocity


def card_for(teacher: Teacher, plan: CompressionPlan, shape: tuple[int, int, int, int], *, recipe: Mapping[str, float] = {},
             role: Role | None = None, **settings: Any) -> StudentCard:
    """What a student of this teacher says of itself, made for videos of latent shape (C, T, H, W); settings: other fields of the card."""
    config = teacher.config
    return StudentCard(
        shift=teacher.shift, size=video_size(shape),
        teacher=f"{config.model_type}, {config.num_layers} blocks of {config.dim}, FFN {config.ffn_dim}",
        teacher_fingerprint=teacher.fingerprint, keep=plan.keep, ffn_dim=plan.ffn_dim, ffn_kept=plan.ffn_kept,
        **({} if role is None else {"expert": role.side, "boundary": role.boundary}),
        recipe={"teacher_layers": plan.teacher_layers, "teacher_ffn_dim": plan.teacher_ffn_dim, **recipe}, **settings)


@contextmanager
def _staging(folder: Path, fingerprint: str) -> Iterator[Path]:
    """A folder beside the start's place for what is being made; gone afterwards."""
    staging = folder / f".{fingerprint}.partial"
    shutil.rmtree(staging, ignore_errors=True)          # what a power cut left
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(place: Path, new: Path, teacher: Teacher, weights: _Weights, card: StudentCard, measured: Measured) -> Built:
    """The whole folder is made as `new` and moved to its place at once: what is there is complete."""
    plan, config = weights.plan, weights.plan.student_config(teacher.config)
    written = write_student(new, config=config, card=card, tensors=weights())
    report = describe(plan, measured, teacher_config=teacher.config, teacher=tuple(weights.size),
                      student=(wan_size(config), written.bytes))
    handle = StudentHandle(folder=str(place), config=config, plan=plan, fingerprint=place.name, card=card,
                           same_as=teacher.fingerprint if plan.prunes_nothing else "")
    write_json(written.path / NOTE, {"handle": {**handle.to_json(), "folder": ""}, "report": report, "bytes": written.file.stat().st_size})
    if place.exists():                              # damaged: _read refused it
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    patiently(os.rename, written.path, place)
    return handle, report


def _counted(weights: Iterable[tuple[str, Tensor]], size: list[int]) -> Iterator[tuple[str, Tensor]]:
    """Passes tensors on, and adds up their numbers and bytes in size[0] and size[1]."""
    for name, tensor in weights:
        size[0] += tensor.numel()
        size[1] += tensor.numel() * tensor.element_size()
        yield name, tensor


def _read(place: Path) -> Built | None:
    """The start that an earlier request left here; None when it is absent or not whole."""
    if not (place / NOTE).is_file():
        return None
    try:
        noted = read_json(place / NOTE)
        handle = StudentHandle.from_json({**noted["handle"], "folder": str(place)})
        if handle.file.stat().st_size != noted["bytes"]:
            raise ValueError("the weights have another size")
        return handle, noted["report"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("The start in %s is damaged (%s); it is made again.", place.name, error)
        return None
