"""The zoo: what the Teleporter finds in models that people use, and whether it is exact there.

`python benchmarks/zoo.py [NAME ...]` writes benchmarks/zoo.md (with names: prints those models alone). Models of
torchvision, timm, transformers and peft in small configurations with random weights, nothing is downloaded; packages in
requirements-zoo.txt. Every number is measured in float64 on the real model, on weights disturbed so that no gain is one
and no bias zero; every symmetry is moved by an element of size e^±1 at once, then all hidden units are permuted.
"""

import importlib.util
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.run import write_text  # noqa: E402
from teleporter import Teleporter  # noqa: E402
from teleporter.passes import kept_attributes, same_randomness  # noqa: E402
from teleporter.verify import called, relative_change, tensors_of  # noqa: E402

IMAGE = 64


def declared_detection_operators():
    """torchvision declares its compiled detection operators; where they do not fit this torch, an empty declaration
    lets it be imported. None of the models here uses them."""
    path = Path(importlib.util.find_spec("torchvision").submodule_search_locations[0], "_meta_registrations.py")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in dict.fromkeys(
        re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', path.read_text(encoding="utf-8"))
    ):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    return library


def images(size=IMAGE, channels=3):
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def of_torchvision():
    from torchvision import models as tv
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.resnet import BasicBlock, Bottleneck

    options = {"num_classes": 10}
    yield "ResNet, basic blocks", lambda: tv.ResNet(BasicBlock, [1, 1, 1, 1], **options), images()
    yield "ResNeXt", lambda: tv.ResNet(Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=8, **options), images()
    yield "MobileNetV2", lambda: tv.MobileNetV2(width_mult=0.25, **options), images()
    yield "MobileNetV3", lambda: tv.mobilenet_v3_small(width_mult=0.25, **options), images()
    yield "MNASNet", lambda: tv.MNASNet(0.25, **options), images()
    yield "ShuffleNetV2", lambda: tv.ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 64], **options), images()
    yield "DenseNet", lambda: tv.DenseNet(8, (2, 2, 2), 16, **options), images()
    yield "SqueezeNet", lambda: tv.SqueezeNet("1_1", **options), images()
    yield "GoogLeNet", lambda: tv.GoogLeNet(aux_logits=False, init_weights=False, **options), images()
    yield "EfficientNet", lambda: tv.efficientnet_b0(**options), images()
    yield "RegNet", lambda: tv.regnet_y_400mf(**options), images()
    yield "ConvNeXt", lambda: tv.ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], **options), images()
    yield (
        "Swin",
        lambda: tv.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], **options),
        images(),
    )
    yield "ViT", lambda: tv.VisionTransformer(IMAGE, 16, 2, 4, 32, 64, **options), images()
    yield (
        "MaxViT",
        lambda: tv.MaxVit((IMAGE, IMAGE), 16, 4, [16, 32], [1, 1], 8, 0.0, **options),
        images(),
    )


TIMM = (
    "test_byobnet test_convnext test_convnext2 test_convnext3 test_efficientnet test_efficientnet_gn "
    "test_efficientnet_ln test_efficientnet_evos test_mambaout test_nfnet test_resnet test_vit test_vit2 "
    "test_vit4 mobilenetv3_small_050 mobilenetv2_035 lcnet_035 tinynet_e ghostnet_050 mnasnet_small mobilevit_xxs "
    "edgenext_xx_small semnasnet_075 mobileone_s0 repghostnet_050"
).split()
SMALL_TIMM = {
    "vit_tiny_patch16_224": {"img_size": IMAGE, "embed_dim": 32, "depth": 2, "num_heads": 4},
    "cait_xxs24_224": {"img_size": IMAGE, "embed_dim": 32, "depth": 2, "num_heads": 4},
    "eva02_tiny_patch14_224": {"img_size": 56, "embed_dim": 32, "depth": 2, "num_heads": 4},
    "beit_base_patch16_224": {"img_size": IMAGE, "embed_dim": 32, "depth": 2, "num_heads": 4},
    "xcit_nano_12_p16_224": {"img_size": IMAGE, "embed_dim": 32, "depth": 2, "num_heads": 4},
}


def of_timm():
    import timm

    for name in TIMM:
        yield name, lambda name=name: timm.create_model(name, num_classes=10), images()
    for name, options in SMALL_TIMM.items():
        make = lambda name=name, options=options: timm.create_model(name, num_classes=10, **options)  # noqa: E731
        yield name, make, images(options["img_size"])
    from timm.models import mlp_mixer

    mixer = {"num_classes": 10, "img_size": IMAGE, "patch_size": 16, "num_blocks": 2, "embed_dim": 32}
    for name, ratio in ("MixerBlock", (0.5, 4.0)), ("ResBlock", 4), ("SpatialGatingBlock", 4):
        settings = {**mixer, "block_layer": getattr(mlp_mixer, name), "mlp_ratio": ratio}
        yield f"MlpMixer, {name}", lambda settings=settings: mlp_mixer.MlpMixer(**settings), images()


# The common small configuration: names of the same thing in the configurations of transformers.
SIZES = {
    ("vocab_size",): 50,
    ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "word_embed_dim"): 32,
    ("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_layers"): 2,
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"): 4,
    ("num_key_value_heads",): 2,
    ("head_dim", "d_kv", "kv_channels"): 8,
    ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "n_inner"): 64,
    ("max_position_embeddings", "n_positions"): 64,
    ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"): 0,
}
CAUSAL = (
    "GPT2 GPTNeoX GPTJ GPTNeo OPT Bloom Llama Mistral Qwen2 Qwen3 Gemma Gemma2 Phi Phi3 Falcon StableLm Starcoder2 "
    "Cohere Olmo Olmo2 Granite Mixtral"
).split()
ENCODERS = "Bert Roberta DistilBert Electra Albert DebertaV2 MPNet ModernBert".split()
WITH_DECODER = "T5 Bart".split()


def configured(transformers, name, **options):
    make = getattr(transformers, f"{name}Config")
    known = make().to_dict()
    small = {key: value for keys, value in SIZES.items() for key in keys if key in known}
    if name == "GPTNeo":
        small |= {"attention_types": [[["global", "local"], 1]]}
    if name == "GPTJ":
        small |= {"rotary_dim": 4}
    if name == "Mixtral":
        small |= {"experts_implementation": "eager"}
    return make(**{**small, **options})


def tokens(decoder=False):
    ids = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if decoder else {})


def of_transformers():
    import transformers

    for names, kind in ((CAUSAL, "ForCausalLM"), (ENCODERS, "Model"), (WITH_DECODER, "ForConditionalGeneration")):
        for name in names:
            kind_of = "LMHeadModel" if name == "GPT2" else kind

            def make(name=name, kind=kind_of):
                return getattr(transformers, name + kind)(configured(transformers, name))

            yield name, make, tokens(kind == "ForConditionalGeneration")
    vision = {"image_size": IMAGE, "patch_size": 16}
    for name in ("ViT", "DeiT", "Dinov2"):

        def make(name=name):
            return getattr(transformers, f"{name}Model")(configured(transformers, name, **vision))

        yield name, make, {"pixel_values": images()}


def of_peft():
    import peft
    import transformers

    def adapted(adapter):
        base = transformers.LlamaForCausalLM(configured(transformers, "Llama"))
        return peft.get_peft_model(base, adapter)

    target = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    yield "LoRA on Llama", lambda: adapted(peft.LoraConfig(r=4, **target)), tokens()
    yield "LoRA with dropout", lambda: adapted(peft.LoraConfig(r=4, lora_dropout=0.1, **target)), tokens()
    yield "rank-stabilized LoRA", lambda: adapted(peft.LoraConfig(r=4, use_rslora=True, **target)), tokens()
    yield "DoRA", lambda: adapted(peft.LoraConfig(r=4, use_dora=True, **target)), tokens()
    yield "LoHa", lambda: adapted(peft.LoHaConfig(r=4, **target)), tokens()
    ia3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    yield "IA3", lambda: adapted(peft.IA3Config(**ia3)), tokens()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def disturbed(model):
    """In float64, with noise on every parameter; frozen ones stay frozen."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.add_(noise * (0.1 * p.abs().mean() + 0.01))
    return model


def in_double(x):
    if isinstance(x, dict):
        return {key: in_double(value) for key, value in x.items()}
    return x.double() if x.is_floating_point() else x


def loss_fn(output):
    """The mean square of all that comes out."""
    values = vars(output).values() if hasattr(output, "__dataclass_fields__") else [output]
    return sum(x.square().mean() for x in values if isinstance(x, torch.Tensor) and x.is_floating_point())


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def matrices(model):
    """Names of the modules whose weights are maps: what a reader expects to move."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name.rpartition(".")[0] for name, p in trainable if p.ndim > 1 and "." in name and "norm" not in name}


def half_moved(model, symmetries, tangents, before, output):
    """The smallest of the output's changes if the writers of a symmetry move and its readers do not: a symmetry that
    the output would not notice earns nothing. At most eight are tried."""
    parameters, changes = dict(model.named_parameters()), []
    for s, T in list(zip(symmetries, tangents))[:: max(1, len(symmetries) // 8)]:
        writers = s._replace(slots=tuple(slot for slot in s.slots if not slot.reads))
        weights = {slot.name: parameters[slot.name].detach().clone() for slot in writers.slots}
        with torch.no_grad():
            writers.act_(parameters, T)
            changes.append(relative_change(before, output()))
            for name, W in weights.items():
                parameters[name].copy_(W)
    return min(changes)


def prepared(make, inputs):
    """A disturbed model, its inputs, both in float64, and a function that returns what comes out."""
    torch.manual_seed(0)
    model, inputs = disturbed(make()), in_double(inputs)

    def output():
        with torch.no_grad(), same_randomness(model), kept_attributes(model):
            return tensors_of(called(model, inputs))

    return model, inputs, output


def measured(make, inputs):
    """{column: value} of one model."""
    model, inputs, output = prepared(make, inputs)
    start = time.perf_counter()
    teleporter = Teleporter(model, inputs=inputs)
    built = time.perf_counter() - start
    generator, before = torch.Generator().manual_seed(1), output()
    tangents = []
    for s in teleporter.symmetries:
        T = s.tangent(torch.randn(s.shape, generator=generator, dtype=torch.float64))
        tangents.append(T.sign() if s.kind == "rescale" else T / torch.linalg.matrix_norm(T, ord=2)[..., None, None])
    half = half_moved(model, teleporter.symmetries, tangents, before, output)
    teleporter.apply(tangents)
    change = relative_change(before, output())
    teleporter.undo()
    passed = min(seconds(lambda: loss_fn(called(model, inputs)).backward()) for _ in range(2))
    step = seconds(lambda: teleporter.step(inputs, loss_fn))
    moved = {slot.name.rpartition(".")[0] for s in teleporter.symmetries for slot in s.slots}
    expected, kinds = matrices(model), Counter(s.kind for s in teleporter.symmetries)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "symmetries": ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())),
        "dimension": sum(row["dimension"] for row in teleporter.table()),
        "moved": f"{len(expected & moved)} / {len(expected)}",
        "change": change,
        "half": half,
        "seconds": built,
        "passes": step / passed,
        "refuted": sum("a trial changed" in reason for reason in teleporter.left_alone.values()),
        "unexplained": sorted(
            expected - moved - {n for name in teleporter.left_alone for n in re.split(", | -> ", name)}
        ),
        "left alone": reasons(teleporter.left_alone),
    }


def permuted(make, inputs):
    """The same of permutations: how many spaces, units in them, the output's change when all are permuted."""
    model, inputs, output = prepared(make, inputs)
    try:
        teleporter = Teleporter(model, "permutation", inputs=inputs)
    except ValueError:  # nothing was found
        return {"spaces": 0, "units": 0, "permuted": 0.0, "undone": True}
    start, before = {name: x.clone() for name, x in model.state_dict().items()}, output()
    teleporter.permute(generator=torch.Generator().manual_seed(1))
    change = relative_change(before, output())
    teleporter.undo()
    undone = all(torch.equal(x, start[name]) for name, x in model.state_dict().items())
    units = sum(s.shape[0] for s in teleporter.symmetries)
    return {"spaces": len(teleporter.symmetries), "units": units, "permuted": change, "undone": undone}


def reasons(left_alone):
    """The three most frequent, without names and numbers."""
    short = (re.sub(r" in \S+( is| joins|$)| \S+\.\S+|\d+", r"\1", reason).strip() for reason in left_alone.values())
    counts = Counter(re.sub(r"^\S+ (normalizes|adds|multiplies|has)", r"\1", reason) for reason in short)
    shown = [f"{n} × {reason[:60]}" for reason, n in counts.most_common(3)]
    return "; ".join(shown) + (f"; {len(counts) - 3} more" if len(counts) > 3 else "")


def line(package, name, row):
    if "error" in row:
        return f"| {package} | {name} | | | | | | | | {row['error']} |"
    cells = [
        f"{row['parameters']:,}",
        row["symmetries"],
        f"{row['dimension']:,}",
        row["moved"],
        f"{row['change']:.0e}, {row['half']:.0e}",
        f"{row['spaces']} of {row['units']:,}, {row['permuted']:.0e}",
    ]
    cells += [f"{row['seconds']:.1f}, {row['passes']:.1f}", row["left alone"]]
    return f"| {package} | {name} | {' | '.join(cells)} |"


def documented(rows):
    fine = [row for _, _, row in rows if "error" not in row]
    packages = {p: importlib.import_module(p).__version__ for p in ("torch", *dict.fromkeys(p for p, _, _ in rows))}
    exact, earned = sum(row["change"] <= 1e-8 for row in fine), sum(row["half"] > 1e-6 for row in fine)
    # Norms that compute in float32 round a stream that turns, whatever the model's dtype.
    rounded = sum(1e-8 < row["change"] <= 1e-6 and "stream" in row["symmetries"] for row in fine)
    unexplained = [f"{name}: {', '.join(row['unexplained'])}" for _, name, row in rows if row.get("unexplained")]
    refuted = sum(row["refuted"] for row in fine)
    permutable = [row for row in fine if row["spaces"]]
    units, undone = (sum(row[key] for row in permutable) for key in ("units", "undone"))
    return "\n".join([
        "# The zoo", "",
        f"Written by `python benchmarks/zoo.py`; {', '.join(f'{p} {v}' for p, v in packages.items())}. Small "
        "configurations, random weights, float64, evaluation mode.", "",
        f"{len(rows)} models: {exact} with every symmetry exact (output's relative change ≤ 1e-8 when all are moved at "
        f"once by elements of size e^±1), {rounded} by up to 1e-6, where norms compute in float32 whatever the model's "
        f"dtype and a stream turns, {len(fine) - exact - rounded} changed, {len(rows) - len(fine)} in which nothing "
        f"was found or which failed. {refuted} "
        "candidates were refuted by the trial before any move and left alone. Layers neither moved nor left alone with "
        f"a reason: {'; '.join(unexplained) or 'none'}.", "",
        f"Permutations of hidden units: {units:,} units in {sum(row['spaces'] for row in permutable)} spaces of "
        f"{len(permutable)} models; all permuted at once at random, the output changes by up to "
        f"{max((row['permuted'] for row in permutable), default=0):.0e} of its size. In {undone} models they were "
        "taken back bit for bit.", "",
        "*moved*: modules with a weight matrix that are part of a symmetry, of all that are trainable. *change*: as "
        "above. *half*: the smallest change when the writers of a symmetry move and its readers do not (up to eight "
        f"symmetries tried), above 1e-6 in {earned} models: there the output would have shown a mistake. *seconds*: "
        "finding and trying. *passes*: the cost of a step in forward-backward passes. *permuted*: spaces, their units, "
        "the output's change.", "",
        "| package | model | parameters | symmetries | dimension | moved | change, half | permuted | seconds, passes | "
        "left alone |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(line(*row) for row in rows), "",
    ])  # fmt: skip


def main(wanted):
    warnings.filterwarnings("ignore")
    library, rows = declared_detection_operators(), []
    families = ("torchvision", of_torchvision), ("timm", of_timm), ("transformers", of_transformers), ("peft", of_peft)
    for package, models in families:
        for name, make, inputs in models():
            if wanted and name not in wanted:
                continue
            try:
                row = measured(make, inputs) | permuted(make, inputs)
            except Exception as error:  # one odd model must not stop the others
                row = {"error": f"{type(error).__name__}: {str(error)[:100]}".replace("\n", " ").replace("|", "/")}
            rows.append((package, name, row))
            print(line(*rows[-1]), flush=True)
    if not wanted:
        write_text(Path(__file__).with_suffix(".md"), documented(rows))
    return library


if __name__ == "__main__":
    main(sys.argv[1:])
