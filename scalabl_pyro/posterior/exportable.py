"""How a posterior leaves this library: as PEFT adapters, and merged into a plain model."""

from pathlib import Path

from torch import nn

from .._arguments import known_arguments_of_methods
from .._process.random_state import scoped_seed
from .analyzed import AnalyzedPosterior
from .engines import Engine
from .export_peft import DrawsToExport, Dtype, export_peft
from .merge import merge


@known_arguments_of_methods
class ExportablePosterior(AnalyzedPosterior):
    """A posterior whose draws other tools can run; :class:`~scalabl_pyro.Posterior` adds prediction and saving."""

    def export_peft(
        self,
        path: str | Path,
        *,
        draws: DrawsToExport = "mean",
        seed: int = 0,
        for_engine: Engine | None = None,
        dtype: Dtype | None = None,
    ) -> list[Path]:
        """Write draws as ordinary PEFT LoRA adapters, one folder per draw, for engines and tools that read LoRA.

        gamma and s are folded into A. All layers are padded with zeros to one rank, and ``lora_alpha`` is that rank, so
        that every engine scales the update right. Each adapter is loaded with plain PEFT, and its logits are compared
        with those of the draw. The file ``index.json`` holds the seed, the guide, the fingerprint of the base model and
        the largest error of a logit.

        To predict, average the *probabilities* of the adapters, never their logits. The adapter ``"mean"`` is the
        function at the mean of s, which is not the average prediction.

        Args:
            path: New folder. After an error it does not exist.
            draws: ``"mean"`` writes the folder ``mean``. A number K writes ``draw-0`` to ``draw-{K - 1}``. A list
                ``[0, 5]`` writes these two. Draw i is that of :meth:`draw` with the same seed.
            seed: Seed of the draws.
            for_engine: Engine whose limits are checked: ``"vllm"``, ``"sglang"`` or ``"llama.cpp"``.
            dtype: Type of the factors in the files; None for that of training (float32). In bfloat16 the files are half
                as large, and the error in the index is larger.

        Returns:
            Folders of the adapters.

        Raises:
            FileExistsError: ``path`` exists and is not empty.
            ValueError: There is no such draw, the engine cannot serve the posterior, or the posterior holds something
                that no PEFT adapter can hold. The message names the way out.

        Example:
            >>> folders = posterior.export_peft("adapters", draws=2, seed=0)
            >>> [folder.name for folder in folders]
            ['draw-0', 'draw-1']
        """
        with scoped_seed(0):  # PEFT fills new layers with random values before they get those of the draw
            return export_peft(self, path, draws=draws, seed=seed, for_engine=for_engine, dtype=dtype)

    def merge(self, draw: int | None = None, *, seed: int = 0) -> nn.Module:
        """Merge one draw into a copy of the weights: a plain Hugging Face model, for ``save_pretrained`` and any tool.

        If LoRA is on a head that the model ties to its embeddings, the copy has a head of its own, and its
        configuration says ``tie_word_embeddings=False``. The logits are compared with those of the draw.

        Args:
            draw: Number of the draw, from 0 on; None for the posterior mean. Draw i is that of :meth:`draw`.
            seed: Seed of the draws.

        Returns:
            Model in eval mode, which shares no memory with this posterior. In half precision each merged weight is
            rounded.

        Raises:
            ValueError: The weights are quantized, or ``draw`` is not a whole number from 0 on.

        Example:
            >>> posterior.merge(draw=3).save_pretrained("merged")
        """
        with scoped_seed(0):
            return merge(self, draw, seed=seed)
