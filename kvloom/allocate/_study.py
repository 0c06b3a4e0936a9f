"""A search that any number of processes on any number of machines can join, leave and go on with.

Its state is an Optuna study (T. Akiba et al., *Optuna*, KDD 2019): in memory, in a journal file on a shared disk, or in
a database. Every process asks it for the next trial and tells it the result. While a process measures, it counts up a
beat in its trial; a trial whose count has stood still belongs to a process that was killed: another one fails it and
tries the same again. Only counts are compared, so clocks may differ.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvloom._extras import require
from kvloom.errors import PlanError

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

Sampler = Literal["nsga2", "moead"]
Picks = tuple[int, ...]

_MISSED = 6
"""Beats after which a count that stands still is a dead process's."""
_ABOUT, _BEAT, _EXCESS = "about", "beat", "excess"


@dataclass(frozen=True, slots=True)
class StudySettings:
    """How a search runs, and where its state lies.

    Attributes:
        trials: finished trials after which it ends, those of all processes together.
        sampler: what proposes trials: `nsga2` (K. Deb et al., *A fast and elitist multiobjective genetic algorithm:
            NSGA-II*, 2002) or `moead` (Q. Zhang and H. Li, *MOEA/D*, 2007).
        seed: of the sampler. One process alone proposes the same at every run, also after a stop.
        storage: a journal file's path, a database URL such as `postgresql://host/db`, or None for memory.
        name: of the study in its storage.
        beat: seconds between signs of life; after six without one a process counts as dead.
    """

    trials: int = 200
    sampler: Sampler = "nsga2"
    seed: int = 0
    storage: str | None = None
    name: str = "kvloom"
    beat: float = 10.0

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise PlanError(f"trials is {self.trials}: give at least 1")


@dataclass(frozen=True, slots=True)
class Space:
    """What is searched.

    Attributes:
        sizes: number of options of each variable.
        measure: picks -> the two objectives, both to be small.
        excess: picks -> how far they break the constraint; not above 0 if they keep to it.
        starts: picks that are tried first.
        about: what the results depend on; processes with another text are refused.
    """

    sizes: Picks
    measure: Callable[[Picks], tuple[float, float]]
    excess: Callable[[Picks], float]
    starts: tuple[Picks, ...]
    about: str


@dataclass(frozen=True, slots=True)
class Found:
    """A finished trial: its picks and their objectives."""

    picks: Picks
    values: tuple[float, float]


def run_study(space: Space, settings: StudySettings, progress: Callable[[str, int, int], None]) -> list[Found]:
    """Takes part in a search until it has as many finished trials as it should.

    Args:
        space: what is searched.
        settings: how, and where its state lies.
        progress: told `(what, done, total)` before every trial.

    Returns:
        All finished trials, those of other processes included, in the order they were asked for.

    Raises:
        MissingExtraError: optuna is not installed.
        PlanError: the storage holds a study of this name about something else.
    """
    require("search", "A search")
    study = _open(settings, space.about)
    if not study.trials:
        for start in space.starts:
            study.enqueue_trial(_named(start), skip_if_exists=True)
    watch = _Watch(study, settings.beat)
    while (done := len(_finished(study))) < settings.trials:
        progress("trial", done, settings.trials)
        watch.bury_the_dead()
        if done + watch.running >= settings.trials:
            time.sleep(settings.beat / 2)  # the last trials are under way elsewhere
        else:
            _one_trial(study, space, settings)
    progress("searched", settings.trials, settings.trials)
    return [_found(trial) for trial in _finished(study)]


def _one_trial(study: Study, space: Space, settings: StudySettings) -> None:
    study.sampler = _sampler(space, settings.sampler, settings.seed + len(study.trials))
    trial = study.ask()
    picks = tuple(trial.suggest_int(name, 0, size - 1) for name, size in _named(space.sizes).items())
    trial.set_constraint(_EXCESS, space.excess(picks))
    known = {it.picks: it.values for it in map(_found, _finished(study))}
    with _beating(trial, settings):
        values = known[picks] if picks in known else space.measure(picks)
    study.tell(trial, values, skip_if_finished=True)


def _named(values: Sequence[int]) -> dict[str, int]:
    return {f"group_{n}": value for n, value in enumerate(values)}


def _found(trial: FrozenTrial) -> Found:
    picks = tuple(trial.params[name] for name in _named(range(len(trial.params))))
    loss, size = trial.values
    return Found(picks, (loss, size))


def _finished(study: Study) -> list[FrozenTrial]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _open(settings: StudySettings, about: str) -> Study:
    import optuna

    told = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # that a study is there is no news
    study = optuna.create_study(
        storage=_storage(settings.storage),
        study_name=settings.name,
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )
    optuna.logging.set_verbosity(told)
    if study.user_attrs.get(_ABOUT, about) != about:
        raise PlanError(
            f"the study {settings.name!r} in {settings.storage} searches something else (another profile, budget, "
            "objective or window): give another name"
        )
    study.set_user_attr(_ABOUT, about)
    return study


def _storage(text: str | None) -> BaseStorage | str | None:
    if text is None or "://" in text:
        return text
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    Path(text).absolute().parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(text))


def _sampler(space: Space, name: Sampler, seed: int) -> BaseSampler:
    """A sampler that has forgotten nothing: both read the past from the study."""
    if name == "moead":
        from kvloom.allocate._moead import MOEAD

        return MOEAD(_named(space.sizes), seed)
    from optuna.samplers import NSGAIISampler

    return NSGAIISampler(seed=seed)


@contextmanager
def _beating(trial: Trial, settings: StudySettings) -> Iterator[None]:
    """Counts up the trial's beat in the background, where other processes could see it."""
    if settings.storage is None:
        yield
        return
    stopped = threading.Event()

    def beat() -> None:
        count = 0
        while not stopped.wait(settings.beat):
            count += 1
            trial.set_user_attr(_BEAT, count)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


class _Watch:
    """What this process has seen of the trials that others are at."""

    def __init__(self, study: Study, beat: float) -> None:
        self._study, self._patience = study, _MISSED * beat
        self._seen: dict[int, tuple[Any, float]] = {}
        self.running = 0

    def bury_the_dead(self) -> None:
        """Fails trials whose beat has stood still for long, has them tried again, and counts the others."""
        from optuna.trial import TrialState

        now, self.running = time.monotonic(), 0
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            count = trial.user_attrs.get(_BEAT, 0)
            known, since = self._seen.get(trial.number, (None, now))
            self._seen[trial.number] = (count, since if known == count else now)
            if known == count and now - since > self._patience:
                self._retry(trial)
            else:
                self.running += 1

    def _retry(self, trial: FrozenTrial) -> None:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            self._study.tell(trial.number, state=TrialState.FAIL)
        except (UpdateFinishedTrialError, ValueError):  # another process was faster
            return
        self._study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})
