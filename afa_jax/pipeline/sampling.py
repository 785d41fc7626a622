"""Pictures: of prompts, of a file of prompts, and of the maps behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa_jax.cli.arguments import check_prompt_file, check_prompts, check_run
from afa_jax.errors import InputError
from afa_jax.files import check_folder
from afa_jax.pipeline.base import Opened, Place
from afa_jax.sampling.prompt_lines import read_lines

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from afa_jax.sampling.pictures import Pictures


class Sampling(Opened):
    """What makes pictures: the call, ``sample_file`` and ``maps``."""

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | None = None,
        num_images: int | None = None,
        seed: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: Sequence[int] | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        method: str | Mapping[str, Any] | None = None,
        maps: bool = False,
        callback: Callable[[int, int, np.ndarray], object] | None = None,
        on_picture: Callable[[int, int, Image], object] | None = None,
        out: Place | None = None,
        overwrite: bool = False,
        quiet: bool = False,
        num_inference_steps: int | None = None,
        num_images_per_prompt: int | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance: float | None = None,
    ) -> Pictures:
        """Make pictures of one or several prompts.

            ens("fox, blob style", num_images=4, seed=1).images
            ens(["fox", "owl"], negative_prompt="text", steps=25, guidance_scale=5, size=(512, 768), maps=True).maps

        A picture depends on these arguments and on its number among those of its prompt, not on the other pictures that
        are made with it. The first call with a size compiles; new prompts, seeds, steps and guidance do not.

        Args:
            prompt: one or several prompts. It may be None only after ``from_image``: None, here and below, then takes
                the picture's own value.
            negative_prompt: what not to draw; none by default.
            num_images: the number of pictures of each prompt; 1 by default. Also num_images_per_prompt.
            seed: the noise's seed, 0 to 2**32 - 1; 0 by default. -1 draws a random one, which the recipe records.
            steps: the number of the sampler's steps; the config's by default. Also num_inference_steps.
            guidance_scale: 1 (none) or more; the config's by default. Also guidance.
            size: rows and columns in pixels; the config's by default. Also height and width.
            sampler: the sampler's name, "ddim" by default.
            eta: 0 (default) is deterministic, 1 has as much noise as DDPM.
            method: as ``--method`` of the command, ``KIND[:EXPERT][,OPTION=VALUE]...``; a name of the config's list; or
                a dict with ``kind``. By default the method that the run was trained as, or "uniform" without a run.
            maps: keep each expert's weight at each pixel, site and step.
            callback: is called after every step with the step (from 0), its timestep, and the latents ``[b, h, w, c]``
                of the pictures that are sampled together, at most ``sample.batch`` of the config. What it raises ends
                the call. Each step is then a program of its own, which takes longer and rounds its own way: a value of
                a picture may differ by one level of 255.
            on_picture: is called with the number of pictures made, their total number, and the last picture.
            out: a folder to write each picture into as soon as it is made, with their grid; as ``Pictures.save``.
            overwrite: replace files of the same name there.
            quiet: show no bar.

        Raises:
            InputError: an argument cannot be used or is given in both spellings, models do not fit each other or the
                run, or a picture is not finite.
        """
        count = _one(num_images=num_images, num_images_per_prompt=num_images_per_prompt)
        steps = _one(steps=steps, num_inference_steps=num_inference_steps)
        scale = _one(guidance_scale=guidance_scale, guidance=guidance)
        recipe, numbers, again = self.recipe or {}, None, prompt is None
        if prompt is None:
            if not recipe:
                raise InputError("prompt is missing; say what to draw")
            prompt = str(recipe["prompt"])
            numbers = None if count is not None else [int(recipe.get("number", 0))]
        prompts = [prompt] if isinstance(prompt, str) else [*prompt]
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise InputError("prompt: write a text, or a list of one or more")
        check_prompts(prompts)
        settings = dict(
            negative_prompt=negative_prompt, seed=seed, steps=steps, guidance=scale, eta=eta, sampler=sampler
        )
        unasked = all(value is None for value in (*settings.values(), count, size, height, width, method))
        chosen = {name: recipe.get(name) if value is None else value for name, value in settings.items()}
        wanted = recipe.get("size") if (size, height, width) == (None, None, None) else size
        if method is None and recipe:
            method = recipe["sources"]["method"]
        asked = self._asked(
            **chosen, num_images=count, size=wanted, height=height, width=width, method=method, maps=maps,
            overwrite=overwrite,
        )  # fmt: skip
        folder = None if out is None else Path(out)
        if self.processes is None:  # else process 0 alone may have it
            if folder is not None:
                check_folder(folder)
            check_run(self.workdir)
        loaded = self._heavy()

        from afa_jax.diffusion.samplers.registry import SAMPLERS
        from afa_jax.sampling.pictures import Asked, sample_prompts

        if (name := asked["sampler"]) not in SAMPLERS:
            raise InputError(f"sampler={name!r:.40}; choose {', '.join(SAMPLERS)}")
        return sample_prompts(
            prompts, Asked(**asked), loaded, folder, numbers=numbers, callback=callback, on_picture=on_picture,
            quiet=quiet,
            **(dict(check=self._check_same) if again and unasked else {}),
        )  # fmt: skip

    def sample_file(
        self,
        prompts: Place,
        out: Place,
        *,
        negative_prompt: str = "",
        num_images: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: Sequence[int] | None = None,
        eta: float | None = None,
        method: str | Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Make the pictures of a file of prompts that are not in a folder yet, over all devices and processes.

        Args:
            prompts: a file with one prompt per line, or .jsonl with ``prompt`` and ``negative_prompt``.
            out: the folder; afa_jax/sampling/sample_many.py describes its contents.
            overwrite: remove the existing pictures first.

        The other arguments and the errors are those of ``__call__``; a folder with another recipe is an error, too.
        """
        file, folder = Path(prompts), Path(out)
        asked = self._asked(
            negative_prompt=negative_prompt, seed=seed, steps=steps, guidance=guidance_scale, eta=eta,
            num_images=num_images, size=size, method=method, overwrite=overwrite,
        )  # fmt: skip
        if self.processes is None:
            check_folder(folder)
            check_prompt_file(file)
            read_lines(file, asked["negative_prompt"], quiet=True)
            check_run(self.workdir)
        loaded = self._heavy()

        from afa_jax.sampling.pictures import Asked, sample_file

        sample_file(file, folder, Asked(**asked), loaded)

    def maps(
        self,
        prompt: str | Sequence[str] = (),
        *,
        out: Place = "maps",
        statistics: str | None = None,
        method: str | Mapping[str, Any] | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: Sequence[int] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write pictures, sheets and animations of the experts' maps, and maps.json; return the path of maps.html.

            ens.maps("octopus and pizza, noto style", out="maps")

        Args:
            statistics: "FILE" or "emoji:N", the prompts over which each site's weights are averaged.
            out: the folder.
            overwrite: replace files of the same name.

        The other arguments and the errors are those of ``__call__``; a method without maps is an error, too.
        """
        prompts = [prompt] if isinstance(prompt, str) else [*prompt]
        if not prompts and not statistics:
            raise InputError("nothing to draw: give --prompt, --statistics or both; see python -m afa_jax.maps --help")
        check_prompts(prompts)
        asked = self._asked(seed=seed, steps=steps, guidance=guidance_scale, size=size, method=method)
        folder = Path(out)
        check_folder(folder)
        check_run(self.workdir)
        self._heavy()

        from afa_jax.report.maps import draw_maps

        own = {name: asked[name] for name in ("method", "seed", "size", "steps", "guidance")}
        return draw_maps(
            self.config, folder, prompts, statistics=statistics, workdir=self.workdir, overwrite=overwrite, **own
        )

    def _check_same(self, method: Any, recipe: Mapping[str, Any]) -> None:
        """Raise InputError if the picture of ``from_image`` would not be reproduced."""
        from afa_jax.sampling.sample_many import first_difference

        old = self.recipe or {}
        same = ("experts", "vae", "tokenizer", "made_by", "dtype", "steps", "guidance", "eta", "size", "sampler")
        different = first_difference({name: old.get(name) for name in same}, {name: recipe[name] for name in same})
        if different:
            raise InputError(
                f"{self._picture}: {different}; say where the models are that made it, by models=, base= and workdir="
            )


def _one(**values: Any) -> Any:
    """Return the value of an argument that has two spellings, or None; raise InputError if both are given."""
    given = [value for value in values.values() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(values)} are one argument; give one of them")
    return given[0] if given else None
