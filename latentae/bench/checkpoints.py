"""A killed benchmark continues: what was counted is kept in ``OUT/progress`` until the results are written."""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentae.bench.processes import Processes
from latentae.bench.state import dump_state, load_state
from latentae.console import say
from latentae.errors import RequestError
from latentae.files import atomic_write, read_json, remove_stale_temporaries, write_json

if TYPE_CHECKING:
    from latentae.bench.measuring import Pass

SAVE_EVERY_SECONDS = 60.0


class Checkpoints:
    """Keeps finished models as JSON, and of the model in work what each process has counted.

    Args:
        out: folder of the results; None keeps nothing.
        plan: all that the figures depend on; what is kept under another plan is refused.
        processes: those that share the work.

    Attributes:
        finished: what `finish` was given before, model by model.

    Raises:
        RequestError: the folder holds another benchmark that was not finished.
    """

    def __init__(self, out: Path | None, plan: dict[str, Any], processes: Processes):
        self.folder = out / "progress" if out else None
        self.processes = processes
        self.saved = time.monotonic()
        found = self._open(plan) if processes.is_first else None
        found = processes.share(found)
        if isinstance(found, str):
            raise RequestError(found)
        self.finished: list[dict[str, Any]] = found

    def _open(self, plan: dict[str, Any]) -> list[dict[str, Any]] | str:
        """What is there already, or why it cannot be continued."""
        if self.folder is None:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(self.folder)
        path = self.folder / "plan.json"
        if not path.exists():
            shutil.rmtree(self.folder)  # what was left when somebody was killed while clearing up
            self.folder.mkdir()
            write_json(path, plan)
            return []
        earlier = read_json(path)
        if differences := [name for name in {**earlier, **plan} if earlier.get(name) != plan.get(name)]:
            return (
                f"{self.folder} holds a benchmark that was not finished, of other {' and '.join(differences)}: repeat "
                "that one to continue it, or remove the folder to start anew."
            )
        finished: list[dict[str, Any]] = []
        while (file := self._file(f"model-{len(finished)}.json")).exists():
            finished.append(read_json(file))
        return finished

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name

    @property
    def _state(self) -> Path:
        return self._file(f"process-{self.processes.rank}.state")

    def save(self, current: "Pass", *, now: bool = False) -> None:
        """Keep what this process has counted, if the last time was long ago or if it has to be ``now``."""
        if self.folder is None or not (now or time.monotonic() - self.saved >= SAVE_EVERY_SECONDS):
            return
        with atomic_write(self._state) as stream:
            stream.write(dump_state(current))
        self.saved = time.monotonic()

    def load(self, fresh: "Pass") -> "Pass":
        """``fresh`` as far as it came before; with the originals of an earlier model's pass where they were kept."""
        if self.folder is None or not self._state.exists() or fresh.quality.knows_originals:
            return fresh
        try:
            saved = load_state(self._state.read_bytes(), fresh)
        except RequestError as error:
            say(f"{self._state}: {error} This model is measured from its first image on.")
            return fresh
        if saved.index == fresh.index:
            if saved.next_batch:
                say(f"Continued from {self.folder}.")
            return saved
        fresh.take_originals(saved.quality)
        return fresh

    def finish(self, entry: dict[str, Any]) -> None:
        """Keep the figures of a model; called by the first process."""
        if self.folder is not None:
            write_json(self._file(f"model-{len(self.finished)}.json"), entry)

    def clear(self) -> None:
        """Forget it all: the results are written."""
        if self.folder is not None:
            shutil.rmtree(self.folder)
