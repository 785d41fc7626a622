"""Put configs/ into the wheel, as afa_jax/configs; all else is said in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies the configs beside the modules; an editable install finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for config, copy in self._copies().items():
                self.mkpath(str(Path(copy).parent))
                self.copy_file(config, copy)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *self._copies().values()]

    def _copies(self) -> dict[str, str]:
        folder = Path(self.build_lib, "afa_jax", "configs")
        return {str(config): str(folder / config.name) for config in sorted(Path("configs").glob("*.py"))}


setup(cmdclass={"build_py": BuildWithConfigs})
