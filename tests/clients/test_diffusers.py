# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""diffusers adds adapters to the parts of its pipelines, saves, loads, weighs, fuses and takes them off."""

import pytest
import torch
from support.helpers import assert_close, assert_equal, differs, randomise, seeded
from transformers import CLIPTextConfig, CLIPTextModel

from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict


CLIENT = "diffusers"
pytestmark = [
    pytest.mark.filterwarnings("error::peft.PeftWarning"),
    pytest.mark.filterwarnings("ignore:the model holds adapters already:peft.PeftWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # about old schedulers
]

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONFIGS = {"LORA": LoraConfig, "LOHA": LoHaConfig, "LOKR": LoKrConfig}


def unet():
    from diffusers import UNet2DConditionModel

    with seeded():
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        ).eval()


def text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with seeded(1):
        return CLIPTextModel(config).eval()


def pipeline(tokenizer):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    with seeded(2):
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    made = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder(),
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def denoise(model) -> torch.Tensor:
    with seeded(3), torch.no_grad():
        return model(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 16)).sample


def encode(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 13).reshape(2, 5)).last_hidden_state


def paint(pipe, **options) -> torch.Tensor:
    with seeded(4):
        return pipe(
            "a tied weight",
            num_inference_steps=2,
            guidance_scale=1.0,
            height=8,
            width=8,
            output_type="latent",
            **options,
        ).images


def adapted(model, name: str, targets: list[str], seed: int):
    """Add an adapter with an effect, whose scaling is not 1."""
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets), name)
    randomise(model, rf"lora_.*{name}", seed)
    return model


@pytest.fixture
def folder(tmp_path):
    """Two adapters for the UNet and the text encoder, in the files that diffusers makes of them."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    for seed, name in enumerate(("one", "two")):
        parts = {
            "unet": adapted(unet(), name, ATTENTION, seed),
            "text_encoder": adapted(text_encoder(), name, ["q_proj", "v_proj"], seed),
        }
        options = {}
        for part, model in parts.items():
            state = get_peft_model_state_dict(model, adapter_name=name)
            options[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(state)
            options[f"{part}_lora_adapter_metadata"] = model.peft_config[name].to_dict()
        StableDiffusionPipeline.save_lora_weights(tmp_path / name, **options)
    return tmp_path


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.wide] * (name != "LORA")) for name in CONFIGS]
)
def test_adapters_of_a_model_are_added_chosen_fused_and_deleted(method):
    model = unet()
    base = denoise(model)
    outputs = {}
    for seed, name in enumerate(("one", "two")):
        model.add_adapter(CONFIGS[method](r=2, target_modules=ATTENTION), name)
        randomise(model, rf"(lora|hada|lokr)_.*{name}", seed)
        assert model.active_adapters() == [name]
        outputs[name] = denoise(model)
    assert differs(outputs["one"], base) and differs(outputs["one"], outputs["two"])

    model.set_adapter("one")
    assert_equal(denoise(model), outputs["one"])
    model.disable_adapters()
    assert_equal(denoise(model), base)
    model.enable_adapters()
    assert_equal(denoise(model), outputs["one"])

    model.set_adapters(["one", "two"], [0.5, 2.0])
    both = denoise(model)
    model.fuse_lora()
    assert_close(denoise(model), both, atol=1e-4)
    model.unfuse_lora()
    assert_close(denoise(model), both, atol=1e-4)

    model.delete_adapters("two")
    model.set_adapters("one", 1.0)
    assert_close(denoise(model), outputs["one"])
    model.unload_lora()
    assert not hasattr(model, "peft_config")
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in unet().named_parameters()}
    assert_close(denoise(model), base)


def test_adapter_of_a_model_is_saved_loaded_and_hotswapped(tmp_path):
    expected = {}
    for seed, name in enumerate(("one", "two")):
        model = adapted(unet(), name, ATTENTION, seed)
        expected[name] = denoise(model)
        model.save_lora_adapter(tmp_path / name, adapter_name=name)
    file = {"prefix": None, "weight_name": "pytorch_lora_weights.safetensors"}
    model = unet()
    model.load_lora_adapter(tmp_path / "one", adapter_name="mine", **file)
    assert_close(denoise(model), expected["one"])
    model.load_lora_adapter(tmp_path / "two", adapter_name="mine", hotswap=True, **file)
    assert_close(denoise(model), expected["two"])
    assert list(model.peft_config) == ["mine"]


def test_pipeline_loads_what_was_saved(folder, tokenizer):
    pipe = pipeline(tokenizer)
    plain = paint(pipe)
    pipe.load_lora_weights(folder / "one", weight_name="pytorch_lora_weights.safetensors", adapter_name="one")
    assert pipe.get_list_adapters() == {"unet": ["one"], "text_encoder": ["one"]}
    assert pipe.get_active_adapters() == ["one"]
    assert_close(denoise(pipe.unet), denoise(adapted(unet(), "one", ATTENTION, 0)))
    assert_close(encode(pipe.text_encoder), encode(adapted(text_encoder(), "one", ["q_proj", "v_proj"], 0)))

    painted = paint(pipe)
    assert differs(painted, plain)
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    assert_close(paint(pipe), painted, atol=1e-4)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    assert_close(paint(pipe), painted, atol=1e-4)
    half = paint(pipe, cross_attention_kwargs={"scale": 0.5})
    assert differs(half, painted) and differs(half, plain)
    assert_close(paint(pipe), painted, atol=1e-4)
    pipe.disable_lora()
    assert_close(paint(pipe), plain, atol=1e-4)
    pipe.enable_lora()
    assert_close(paint(pipe), painted, atol=1e-4)
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {}
    assert_close(paint(pipe), plain, atol=1e-4)


def test_pipeline_weighs_adapters(folder, tokenizer):
    pipe = pipeline(tokenizer)
    for name in ("one", "two"):
        pipe.load_lora_weights(folder / name, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)
    pipe.set_adapters(["one", "two"], adapter_weights=[0.5, 2.0])
    assert pipe.get_active_adapters() == ["one", "two"]

    by_hand = dict(unet().named_parameters())
    for name, weight in (("one", 0.5), ("two", 2.0)):
        state = get_peft_model_state_dict(pipe.unet, adapter_name=name)
        for key in state:
            if key.endswith("lora_A.weight"):
                part = key.removesuffix(".lora_A.weight")
                delta = state[f"{part}.lora_B.weight"] @ state[key]  # whose scaling is lora_alpha / r = 2
                by_hand[f"{part}.weight"] = by_hand[f"{part}.weight"] + 2 * weight * delta
    with seeded(3):
        inputs = torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 16)
    expected = torch.func.functional_call(unet(), by_hand, inputs).sample
    assert_close(denoise(pipe.unet), expected, atol=1e-4)

    pipe.set_adapters(["two"], adapter_weights=[{"unet": {"down": 0.0, "mid": 0.0, "up": 0.0}, "text_encoder": 0.0}])
    assert_close(denoise(pipe.unet), denoise(unet()))
    pipe.delete_adapters("two")
    assert pipe.get_list_adapters() == {"unet": ["one"], "text_encoder": ["one"]}


def test_pipeline_loads_after_the_last_adapter_was_deleted(folder, tokenizer):
    pipe = pipeline(tokenizer)
    for number, name in enumerate(("one", "two")):
        pipe.load_lora_weights(folder / name, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)
        assert pipe.get_active_adapters() == [name]
        assert_close(denoise(pipe.unet), denoise(adapted(unet(), name, ATTENTION, number)), atol=1e-4)
        pipe.delete_adapters(name)
        assert_close(denoise(pipe.unet), denoise(unet()))
