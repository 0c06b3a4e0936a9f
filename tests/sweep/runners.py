"""Runners without processes."""

from __future__ import annotations

from kvloom.report import load_records
from kvloom.sweep import Outcome, Performer, Runner, why


class Here(Runner):
    """Does jobs in this process, and keeps their names; stops after `at_most`."""

    def __init__(self, at_most=None):
        self.done = []
        self._at_most = at_most

    def run(self, jobs, folder, watch):
        performer = Performer(folder)
        for job in jobs[: self._at_most]:
            failure = None
            try:
                performer.perform(job, lambda *said, name=job.name: watch("here", f"{name}: {said[0]}", *said[1:]))
            except Exception as error:
                failure = why(error)
            self.done.append(job.name)
            yield Outcome(job, failure)


def lasting(folder):
    """What records say, apart from the clock."""
    return [
        {key: value for key, value in record.items() if key not in ("when", "seconds")}
        for record in load_records(folder)
    ]
