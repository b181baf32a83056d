"""An adapter's tensors under the names that LyCORIS gave them and every other program reads.

A host that merges LoRAs itself (ComfyUI) takes these: only the layer's name was another's, and what it does
with an adapter it does as to a file that it has read itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters import Decomposed, Hadamard, Kronecker, LowRank
from .file import Entry

_VALUES = ("diff_b", "up_bias", "set_weight", "reshape_weight")


def canonical_tensors(entry: Entry, in_features: int) -> dict[str, Tensor]:
    """The tensors of an entry's adapter by role, empty where it has none; without biases and set values.

    Where the file may be read in another way, the tensors say the same in the plainest: Tucker's cores are
    multiplied in, DoRA's lengths have two dims, OFT an alpha. An `img_in` that reads other channels than
    `in_features` is filled up with zeros, or says so in `reshape_weight` [2].
    """
    adapter = entry.adapter
    if adapter is None:
        return {}
    tensors = {role: tensor for role, tensor in entry.roles.items() if role not in _VALUES}
    inner = adapter.inner if isinstance(adapter, Decomposed) else adapter
    if isinstance(adapter, Decomposed):
        tensors["dora_scale"] = adapter.magnitude
    if isinstance(inner, LowRank):
        down = inner.down
        if down.shape[1] < in_features:
            down = F.pad(down, (0, in_features - down.shape[1]))
        elif down.shape[1] > in_features:
            tensors["reshape_weight"] = torch.tensor([inner.up.shape[0], down.shape[1]])
        tensors |= {"lora_down.weight": down, "lora_up.weight": inner.up}
    elif isinstance(inner, Hadamard) and "hada_t1" in tensors:
        del tensors["hada_t1"], tensors["hada_t2"]
        tensors |= {"hada_w1_a": inner.up1, "hada_w2_a": inner.up2}
    elif isinstance(inner, Kronecker) and "lokr_t2" in tensors:
        tensors = {role: tensor for role, tensor in tensors.items() if not role.startswith("lokr_")}
        tensors |= {"lokr_w1": inner.first, "lokr_w2": inner.scale * inner.second}
    elif "oft_blocks" in tensors:
        tensors.setdefault("alpha", torch.tensor(0.0))
    return tensors
