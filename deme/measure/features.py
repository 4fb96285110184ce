"""Features of images: what the distances compare, from pytorch_fid's Inception or another network."""

import functools
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from deme.data.decoding import ahead
from deme.errors import UserError, one_line
from deme.job.processes import Processes


class InceptionFeatures(nn.Module):
    """pytorch_fid's Inception features, fed as pytorch_fid does: images scaled to [0, 1]."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 3, H, W) → float32 (B, 2048)."""
        return self.network(pixels.float() / 255)[0].flatten(1)


def load_inception() -> InceptionFeatures:
    """pytorch_fid's feature network in eval mode, its weights downloaded once into torch hub's folder."""
    from pytorch_fid import inception

    # pytorch_fid would unpickle the downloaded file; it holds plain tensors, so weights_only loads it
    inception.load_state_dict_from_url = functools.partial(torch.hub.load_state_dict_from_url, weights_only=True)
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(inception.FID_WEIGHTS_URL).name
    try:
        network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    except OSError as error:
        raise UserError(
            f"the Inception weights can't be downloaded ({one_line(error)}); "
            f"put {inception.FID_WEIGHTS_URL} into {file.parent}"
        ) from None
    except (RuntimeError, EOFError, UnpicklingError) as error:
        reason = one_line(error)
        raise UserError(f"{file}: not the Inception weights ({reason}); delete it to download them again") from None
    return InceptionFeatures(network).eval()


@torch.inference_mode()
def extract(
    processes: Processes,
    network: nn.Module,
    read: Callable[[slice], Any],
    count: int,
    batch_size: int,
    threads: int = 0,
) -> np.ndarray:
    """The features of `count` images over all processes: float32, shape (count, D), the same in every process.

    Args:
        network: has `features`, uint8 RGB (B, 3, H, W) → float32 (B, D).
        read: slice → uint8 RGB images (B, 3, H, W), or what else the network's `features` takes and `to` moves.
        threads: that read ahead.
    """
    edges = [count * rank // processes.num_processes for rank in range(processes.num_processes + 1)]
    first = edges[processes.process_index]
    last = max(first + 1, edges[processes.process_index + 1])  # one without a share takes part, and is dropped below
    batches = [slice(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]
    images = tqdm(
        ahead(read, batches, threads),
        "features",
        len(batches),
        disable=not processes.is_main_process,
        leave=False,
        delay=5,
    )
    parts = [network.features(part.to(processes.device)) for part in images]
    shares = processes.gather(processes.pad_across_processes(torch.cat(parts)))
    shares = shares.cpu().chunk(processes.num_processes)
    features = torch.cat([share[: edges[i + 1] - edges[i]] for i, share in enumerate(shares)]).numpy()
    if not np.isfinite(features).all():
        raise UserError("the feature network gives NaN or infinite values")
    return features
