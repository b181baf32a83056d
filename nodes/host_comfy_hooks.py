"""Scheduled LoRAs (ComfyUI's hooks) on quantized weights.

ComfyUI copies every weight that a hook changes, overwrites it, and writes the copy back. Here a quantized
layer gets the hook's patches beside its own instead: nothing is copied, and nothing has to be written back.
This relies, as of ComfyUI 0.33, on ModelPatcher.patch_hooks, unpatch_hooks and patch_hook_weight_to_device.
"""

from __future__ import annotations

from typing import Any

from .host_comfy_quant import PatchedLinear


def scheduling(kind: Any) -> Any:
    """A class of ModelPatcher, derived from `kind`, whose hooks reach quantized layers too.

    A hook that fails is taken back whole, so that the model stays usable.
    """

    class Scheduling(kind):
        def patch_hooks(self, hooks: Any) -> None:
            try:
                super().patch_hooks(hooks)
                if hooks is not None:
                    self._schedule(self.get_combined_hook_patches(hooks))
            except Exception:
                self.unpatch_hooks()
                raise

        def patch_hook_weight_to_device(
            self,
            hooks: Any,
            combined_patches: dict[str, Any],
            key: str,
            original_weights: dict[str, Any],
            memory_counter: Any,
        ) -> None:
            if not isinstance(_owner(self.model, key), PatchedLinear) or not key.endswith(".weight"):
                super().patch_hook_weight_to_device(
                    hooks, combined_patches, key, original_weights, memory_counter
                )

        def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
            super().unpatch_hooks(whitelist_keys_set)
            if not whitelist_keys_set:
                self._schedule({})

        def _schedule(self, patches: dict[str, Any]) -> None:
            for name, layer in self.model.named_modules():
                if isinstance(layer, PatchedLinear):
                    layer.schedule(patches.get(f"{name}.weight", []))

    return Scheduling


def _owner(model: Any, key: str) -> Any:
    """The module that has a parameter."""
    return model.get_submodule(key.rpartition(".")[0])
