"""What other libraries print about themselves, switched off where they offer a switch."""

import os
import warnings


def quiet() -> None:
    """No bars for reading and writing shards, no deprecations between libraries. Downloads keep their bars."""
    import torch
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils.logging import disable_progress_bar

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed finds too, and warns of
    disable_progress_bar()
    enable_progress_bars()
    between_libraries = r"(lightning|peft|torch\.distributed|transformers)\b"
    warnings.filterwarnings("ignore", category=FutureWarning, module=between_libraries)
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # on a login node
