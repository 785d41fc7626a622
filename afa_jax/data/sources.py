"""Stand-in."""

from typing import Any, Protocol, runtime_checkable

from afa_jax.errors import InputError


class BadExample(InputError):
    """An example that cannot be read."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both in args: that is what pickles
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}; mend it, or leave such examples out with data.bad=skip"


@runtime_checkable
class PictureSource(Protocol):
    """Random access to pictures."""

    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def name(self, index: int) -> str: ...
