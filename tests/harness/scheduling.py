# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which tests each of the processes of `pytest -n` runs, and when the machines are booted."""

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

_MACHINES = "tests/machine"
_IN_COMPANY = ("tests/bus/", "tests/root/")


class ByFile(LoadScopeScheduling):
    """Has one process run what shares something: the tests of a file, and all booted machines.

    The latter are alone on the machine with the tests of tests/unit, which the other one runs.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        directory, _, _ = file.rpartition("/")
        return directory if directory == _MACHINES else file

    def _assign_work_unit(self, node: WorkerController) -> None:
        # A process that has more tests to run in company would wait for all machines to end. Until
        # there is none, this one has something else to do.
        if next(iter(self.workqueue)) == _MACHINES and any(
            scope.startswith(_IN_COMPANY) and not all(tests.values())
            for other, work in self.assigned_work.items()
            if other is not node
            for scope, tests in work.items()
        ):
            rest = (scope for scope in self.workqueue if scope != _MACHINES)
            self.workqueue.move_to_end(next(rest, _MACHINES), last=False)
        super()._assign_work_unit(node)
