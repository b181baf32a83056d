"""What ComfyUI's text nodes and our own make of our CLIP and of its own, on the same weights: prints JSON.

Run by ComfyUI's Python, in its checkout: python inside_text.py PACK CLIP T5 OUTPUT. CLIP and T5 have the
vocabularies of CLIP-L and T5-XXL, and few layers. For each case: "effect", the dB between ComfyUI's CLIP with
the node and with CLIPTextEncode alone, and "agreement", the dB between the two CLIPs.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from inside import load_pack
from inside_patches import decibels

PROMPT, LONG = "a red fox, 12 cm", "a red fox jumps over the lazy dog " * 40
WEIGHTED = [
    "a (red:1.4) fox",
    "a (red) fox",
    "((fox)) a",
    r"a \(red\) fox",
    "a (red fox:0.5) and (a (hill:2))",
]
TAGGED = ["a fox <lora:x:0.8>", "embedding:none fox", "a fox BREAK a hill", "红色的狐狸", "a {red|blue} fox"]
Clip = Any


def stock_clip(clip: str, t5: str, **options: Any) -> Clip:
    """ComfyUI's own CLIP of FLUX.1 with the sizes of two files."""
    import comfy.sd
    import comfy.supported_models_base
    import comfy.text_encoders.flux as flux
    import comfy.utils

    tensors = [comfy.utils.load_torch_file(path) for path in (clip, t5)]
    layers = {"num_layers": 3, "d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64}
    small = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2, "intermediate_size": 128}
    sizes = {"t5xxl_model_config": layers, "clip_l_model_config": small, "dtype": torch.float32}
    target = comfy.supported_models_base.ClipTarget(flux.FluxTokenizer, flux.flux_clip())
    return comfy.sd.CLIP(target, state_dict=tensors, model_options=sizes, **options)


def run(node: Any, *args: Any, **inputs: Any) -> Any:
    """The first output of a node of either of ComfyUI's kinds."""
    if hasattr(node, "execute"):
        return node.execute(*args, **inputs).result[0]
    return getattr(node(), node.FUNCTION)(*args, **inputs)[0]


def cases() -> dict[str, Callable[[Clip], Any]]:
    """What each node makes of a CLIP: a CONDITIONING."""
    import nodes

    extras = {name: importlib.import_module(f"comfy_extras.nodes_{name}") for name in ("flux", "cond")}
    encode, other = nodes.CLIPTextEncode, "a blue hill"

    def both(node: Any, **inputs: Any) -> Callable[[Clip], Any]:
        return lambda clip: run(node, run(encode, clip, other), run(encode, clip, PROMPT), **inputs)

    def layer(number: int) -> Callable[[Clip], Any]:
        return lambda clip: run(encode, run(nodes.CLIPSetLastLayer, clip, number), PROMPT)

    found: dict[str, Callable[[Clip], Any]] = {
        f"CLIPTextEncode {text[:40]!r}": lambda clip, text=text: run(encode, clip, text)
        for text in (PROMPT, "", *WEIGHTED, LONG, *TAGGED[:1], *TAGGED[2:])
    }
    flux, options = extras["flux"].CLIPTextEncodeFlux, extras["cond"].T5TokenizerOptions
    return found | {
        "CLIPTextEncodeFlux": lambda clip: run(flux, clip, "a (fox:1.2)", LONG, 2.5),
        "CLIPSetLastLayer -1": layer(-1),
        "CLIPSetLastLayer -2": layer(-2),
        "CLIPSetLastLayer -3": layer(-3),
        "CLIPSetLastLayer -24": layer(-24),
        "T5TokenizerOptions 300": lambda clip: run(encode, run(options, clip, 0, 300), PROMPT),
        "T5TokenizerOptions 0, 3": lambda clip: run(encode, run(options, clip, 3, 0), PROMPT),
        "ConditioningCombine": both(nodes.ConditioningCombine),
        "ConditioningConcat": both(nodes.ConditioningConcat),
        "ConditioningAverage": both(nodes.ConditioningAverage, conditioning_to_strength=0.3),
        "ConditioningZeroOut": lambda clip: run(nodes.ConditioningZeroOut, run(encode, clip, PROMPT)),
    }


def distance(entries: Any, others: Any) -> float:
    """dB between two CONDITIONINGs: the least of their entries, of T5's vectors and CLIP's; 0 by size."""
    pairs = [
        pair
        for (txt, extra), (other, more) in zip(entries, others, strict=False)
        for pair in ((txt, other), (extra["pooled_output"], more["pooled_output"]))
    ]
    if len(entries) != len(others) or any(a.shape != b.shape for a, b in pairs):
        return 0.0
    return min(decibels(a, b) if b.any() or a.any() else 200.0 for a, b in pairs)


def text_nodes(stock: Clip, ours: Clip, shown: list[str]) -> dict[str, Any]:
    """Our text node on both CLIPs against the embedded editor's encoders: dB, and the notices of each."""
    text = sys.modules["pack.nodes.host_comfy_text"]
    encoders = ours.tokenizer.encoders
    found: dict[str, Any] = {}
    prompts = (PROMPT, "", "a \ud83e fox", *WEIGHTED, *TAGGED, LONG)
    settings = [(weights, length) for length in (0, 128, None) for weights in ("literal", "comfy")]
    for index, prompt in enumerate(prompts):
        weights, length = settings[index % len(settings)]
        said: list[str] = []
        expected = encoders.encode([prompt], None, said.append, length, weights)
        row = []
        for clip in (stock, ours):
            shown.clear()
            entries = text.encode_text(clip, prompt, prompt, 3.5, length, weights)
            row.append(distance(entries, [[expected.txt, {"pooled_output": expected.pooled}]]))
            row.append(shown == (["\n".join(said)] if said else []))
        found[f"{json.dumps(prompt[:30])} {weights} {length}"] = row
    return found


def token_ids(stock: Clip, prompts: list[str]) -> bool:
    """Whether a literal prompt's tokens are those of transformers' tokenizer, all with weight 1."""
    text = sys.modules["pack.nodes.host_comfy_text"]
    readers = text.readers_of(stock.tokenizer)
    return all(
        [token[:2] for token in reader.read(prompt).rows()[0]]
        == [(id, 1.0) for id in getattr(stock.tokenizer, name).tokenizer(prompt)["input_ids"]]
        for prompt in prompts
        for reader, name in ((readers.t5, "t5xxl"), (readers.clip, "clip_l"))
    )


def saved(ours: Clip, clip: str, t5: str, vae: str, output: Path) -> dict[str, Any]:
    """Files of CLIPSave, VAESave and CheckpointSave, and what both loaders read from them."""
    import folder_paths
    from comfy_extras import nodes_model_merging as merging
    from safetensors.torch import load_file

    folder_paths.set_output_directory(str(output))
    merging.CLIPSave().save(ours, "enc")
    files = {name: str(next(output.glob(f"enc_{name}_*"))) for name in ("clip_l", "t5xxl")}
    encode = cases()[f"CLIPTextEncode {PROMPT!r}"]
    text = sys.modules["pack.nodes.host_comfy_text"]
    again = text.load_text_encoders(Path(files["clip_l"]), Path(files["t5xxl"]))
    found = {
        "CLIPSave, ours": distance(encode(again), encode(ours)),
        "CLIPSave, stock": distance(encode(stock_clip(*files.values())), encode(ours)),
    }
    vaes = importlib.import_module("pack.nodes.host_comfy_vae")
    our_vae, latent = vaes.load_vae(Path(vae)), torch.randn(1, 16, 8, 12)
    merging.VAESave().save(our_vae, "vae")
    file = next(output.glob("vae_*"))
    original, written = load_file(vae), load_file(file)
    same = original.keys() == written.keys() and all(torch.equal(original[n], written[n]) for n in written)
    decoded = vaes.load_vae(file).decode(latent), our_vae.decode(latent)
    return found | {"VAESave, names and values": same, "VAESave, ours": decibels(*decoded)}


def checkpoint(ours: Clip, model: str, vae: str, output: Path) -> dict[str, Any]:
    """CheckpointSave of all three, read back by us."""
    import comfy.sd

    text, vaes = sys.modules["pack.nodes.host_comfy_text"], sys.modules["pack.nodes.host_comfy_vae"]
    network, our_vae = (
        sys.modules["pack.nodes.host_comfy_loading"].load_model(Path(model), "auto", "auto"),
        None,
    )
    our_vae, path = vaes.load_vae(Path(vae)), output / "all.safetensors"
    comfy.sd.save_checkpoint(str(path), network, clip=ours, vae=our_vae)
    encode = cases()[f"CLIPTextEncode {PROMPT!r}"]
    latent = torch.randn(1, 16, 8, 12)
    return {
        "CheckpointSave, CLIP": distance(encode(text.load_text_encoders(path, path)), encode(ours)),
        "CheckpointSave, VAE": decibels(vaes.load_vae(path).decode(latent), our_vae.decode(latent)),
    }


@torch.inference_mode()
def main(pack: str, clip: str, t5: str, model: str, vae: str, output: str) -> dict[str, Any]:
    load_pack(Path(pack))
    text = importlib.import_module("pack.nodes.host_comfy_text")
    shown: list[str] = []
    text.notice = shown.append
    stock, ours = stock_clip(clip, t5), text.load_text_encoders(Path(clip), Path(t5))
    ours.cond_stage_model.on_notice = shown.append
    found: dict[str, Any] = {"nodes": {}}
    plain = cases()[f"CLIPTextEncode {PROMPT!r}"](stock)
    for name, case in cases().items():
        theirs = case(stock)
        found["nodes"][name] = [distance(theirs, plain), distance(case(ours), theirs)]
    shown.clear()
    cases()["CLIPTextEncodeFlux"](ours)
    found["a long T5 prompt is read whole"] = shown == []
    cases()[f"CLIPTextEncode {TAGGED[0]!r}"](ours)
    found["tags"] = list(shown)
    found["texts"] = text_nodes(stock, ours, shown)
    found["ids"] = token_ids(stock, [PROMPT, *WEIGHTED, *TAGGED, "", "a  b\n\tc", "É é 🦊 ﬁ"])
    found["saved"] = saved(ours, clip, t5, vae, Path(output)) | checkpoint(ours, model, vae, Path(output))
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
