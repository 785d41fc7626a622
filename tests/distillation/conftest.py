"""The tiny experts of the commands' tests, and short distillations of them."""

from tests.commands.conftest import root as root
