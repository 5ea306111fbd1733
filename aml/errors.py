"""What ends a command without being a bug; here, so that `aml.cli` need not import what raises it."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete, damaged, or does not fit what it is loaded into."""


class ResumeError(RuntimeError):
    """The run cannot be resumed, or not with these settings."""


class LaunchError(RuntimeError):
    """The processes were not started as the run, or what it was asked for, needs them."""


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient was NaN or infinite in more steps in a row than are allowed."""


class Stopped(Exception):
    """SIGINT or SIGTERM came; the run was saved and can be resumed."""

    def __init__(self, signum: int, message: str):
        self.signum = signum
        super().__init__(message)
