"""Switch off messages that other libraries print about themselves."""

import os
import warnings


def quiet() -> None:
    """Hide progress bars of reading and writing shards, and deprecations between libraries; keep bars of downloads."""
    import torch
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils.logging import disable_progress_bar

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would choose too, with a warning
    disable_progress_bar()
    enable_progress_bars()
    between_libraries = r"(lightning|peft|torch\.distributed|transformers)\b"
    warnings.filterwarnings("ignore", category=FutureWarning, module=between_libraries)
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # on a login node
