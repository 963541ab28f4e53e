"""Train the bundled demo model from scratch: a 15 M parameter LLaMA-style causal LM.

    python -m zo_core.models.demo.train --corpus DIR --out DIR [--steps 18000]

``DIR`` holds ``*.txt.xz`` files of blank-line-separated documents. On one H200 the default run
takes about 12 minutes. The recipe is chosen so that massive activations emerge inside the network:
sequences are cut at random offsets, so the attention sink cannot lean on a BOS embedding and the
first token, whatever it is, has to be marked by an MLP part-way up (see MODEL_CARD.md).
"""

import argparse
import json
import lzma
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 8192
CONTEXT = 512
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
HELD_OUT = 0.005  # share of every file's tokens kept for validation


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of ``VOCAB`` tokens over the whole corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((t for text in texts for t in text.split("\n\n")), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of all documents joined by ``END_OF_TEXT``: (training, validation), 1-D int32."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    train, held_out = [], []
    for text in texts:
        documents = tokenizer.encode_batch_fast(text.split("\n\n"))
        ids = np.concatenate([np.array([*d.ids, end], dtype=np.int32) for d in documents])
        cut = int(len(ids) * (1 - HELD_OUT))
        train.append(ids[:cut])
        held_out.append(ids[cut:])
    return np.concatenate(train), np.concatenate(held_out)


def learning_rate(step: int, steps: int, peak: float, warm_up: int) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last 30 %."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    decay_from = 0.7 * steps
    return peak if step < decay_from else peak * (steps - step) / (steps - decay_from)


def batch(ids: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    """``rows`` sequences of CONTEXT + 1 tokens cut at random offsets: int64 [rows, CONTEXT + 1]."""
    offsets = torch.randint(
        len(ids) - CONTEXT - 1, (rows, 1), generator=generator, device=ids.device
    )
    return ids[offsets + torch.arange(CONTEXT + 1, device=ids.device)].long()


@torch.no_grad()
def layer_profile(model: LlamaForCausalLM, tokens: torch.Tensor) -> list[dict[str, float]]:
    """Largest and median magnitude of every block output on ``tokens`` [rows, length]."""
    outputs: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: outputs.append(out.float().abs()))
        for block in model.model.layers
    ]
    model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    profile = []
    for magnitude in outputs:
        top = int(magnitude.argmax())
        channels = magnitude.shape[-1]
        profile.append(
            {
                "top1": float(magnitude.max()),
                "median": float(magnitude.median()),
                "position": top // channels % magnitude.shape[1],
                "channel": top % channels,
                "first_token_top1": float(magnitude[:, 0].amax(-1).median()),
            }
        )
    return profile


def main() -> None:
    """Parse the command line, train, and write a Hugging Face model folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.txt.xz files")
    parser.add_argument("--out", type=Path, required=True, help="where the model folder is written")
    parser.add_argument("--steps", type=int, default=18_000)
    parser.add_argument("--rows", type=int, default=128, help="sequences of 512 tokens a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    files = sorted(args.corpus.glob("*.txt.xz"))
    if not files:
        parser.error(f"--corpus: no *.txt.xz file in {args.corpus}")
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    started = time.time()
    texts = [lzma.decompress(f.read_bytes()).decode() for f in files]
    tokenizer = train_tokenizer(texts)
    train_ids, held_out_ids = encode(tokenizer, texts)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=CONTEXT,
    ).save_pretrained(args.out)
    print(f"{len(train_ids):,} training tokens, {time.time() - started:.0f} s", flush=True)

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        pad_token_id=tokenizer.token_to_id(PAD),
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device)  # type: ignore[arg-type]
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": vectors, "weight_decay": 0},
        ],
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    compiled_loss = torch.compile(loss_of)
    train, held_out = (torch.from_numpy(a).to(device) for a in (train_ids, held_out_ids))
    generator = torch.Generator(device).manual_seed(args.seed)
    validation = batch(held_out, args.rows * 2, torch.Generator(device).manual_seed(1))

    def validate() -> float:
        with torch.no_grad():
            chunks = validation.split(args.rows)
            return float(torch.stack([compiled_loss(c) for c in chunks]).mean())

    log, started = [], time.time()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, warm_up=300)
        loss = compiled_loss(batch(train, args.rows, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 1000 == 0 or step + 1 == args.steps:
            profile = layer_profile(model, validation[:32, :128])
            row = {
                "step": step + 1,
                "loss": float(loss.detach()),
                "validation_loss": validate(),
                "seconds": round(time.time() - started, 1),
                "top1": [round(p["top1"], 1) for p in profile],
                "median": [round(p["median"], 3) for p in profile],
            }
            log.append(row)
            print(json.dumps(row), flush=True)
            (args.out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")

    model.to(torch.bfloat16).save_pretrained(args.out)
    print(json.dumps(layer_profile(model, validation[:32, :128])), flush=True)


if __name__ == "__main__":
    main()
