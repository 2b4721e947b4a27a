"""How to use a model, for its card: commands, and code in Python with JAX and with torch."""

import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from pats_jax.reporting.console import visible
from pats_jax.reporting.report_page import markdown_block, markdown_text

_IN_PEFTS_FORMAT = ("lora", "adalora", "ia3", "prompt", "prefix")

Values = Mapping[str, Any]  # of settings, or of results.json

HERE = "Run the commands in the directory in which the run was started."


def from_hub(repo_id: str, results: Values, whole: bool, primed: bool) -> list[str]:
    """How to load a repository of the hub."""
    if "pipeline_tag" in results:
        return _writer(repo_id, results, whole, is_repository=True)
    load = (
        ["from pats_jax import models", "", f"model, params, config = models.from_pretrained({repo_id!r})"]
        if whole
        else [
            "from huggingface_hub import snapshot_download",
            "from pats_jax import models",
            "",
            f"model, params, config = models.peft.load_peft_model(snapshot_download({repo_id!r}))",
        ]
    )
    if primed and whole:
        load[-1] = load[-1].replace(f"{repo_id!r}", f"{repo_id!r}, num_labels=2")
    lines = ["In Python, with JAX:", "", _python(*load)]
    if not whole or primed:
        return lines
    return [*lines, "", "With Transformers (torch):", "", _pipeline(repo_id), "", _SERVICE, "", _serve(repo_id)]


def is_in_pefts_format(results: Values) -> bool:
    """Whether PEFT loads the adapter; an encoder-decoder's prefixes are in all attentions by default, unlike PEFT's."""
    kind = results.get("peft")
    return kind in _IN_PEFTS_FORMAT and not (kind == "prefix" and "pipeline_tag" in results)


def is_whole(folder: pathlib.Path, results: Values) -> bool:
    """Whether the folder has a whole model, not only an adapter."""
    return (folder / "model").exists() or not results.get("peft")


def of_folder(folder: pathlib.Path, results: Values) -> list[str]:
    """How to load and serve the model: whole, or as an adapter for the base model."""
    whole = is_whole(folder, results)
    part = str(folder / ("model" if whole else "adapter"))
    writes = "pipeline_tag" in results
    lines = _written(folder, part, results, whole) if writes else _classified(part, results, whole)
    kind = results.get("peft")
    if kind:
        loader = "load_peft_seq2seq" if writes else "load_peft_model"
        kind = f"the adapter ({markdown_text(kind)})" + ("" if writes else " and the head")
        lines += [
            "",
            f"The folder `adapter/` contains {kind} for the base model "
            f"{markdown_text(results['model_name_or_path'])}; `pats_jax.models.peft.{loader}` loads both."
            + (" So does PEFT (torch)." if is_in_pefts_format(results) else ""),
        ]
    return [HERE, "", *lines]


def _classified(part: str, results: Values, whole: bool) -> list[str]:
    """How to load and serve a classifier, from its folder or that of its adapter."""
    count = results["num_labels"]
    lines = [
        command(f"pats-jax predict {word(part)} --file texts.tsv"),
        "",
        "In Python, with JAX:",
        "",
        _python(
            "from pats_jax import models",
            "",
            f"model, params, config = models.from_pretrained({part!r}, num_labels={count})"
            if whole
            else f"model, params, config = models.peft.load_peft_model({part!r})",
            f"tokenizer = models.load_tokenizer({(part if whole else results['model_name_or_path'])!r})",
            'inputs = dict(tokenizer(["A text."], return_tensors="np"))',
            'logits = model.apply({"params": params}, **inputs)',
        ),
    ]
    if whole:
        lines += ["", "With Transformers (torch):", "", _pipeline(part), "", _SERVICE, "", _serve(part)]
    return lines


def _written(folder: pathlib.Path, part: str, results: Values, whole: bool) -> list[str]:
    """How to let an encoder-decoder write, from its folder or that of its adapter."""
    if not whole:
        return _writer(part, results, whole)
    flags = f"--do_predict --model_name_or_path {word(part)} --test_file new.tsv"
    prefix = f" --source_prefix {word(results['source_prefix'])}" if results["source_prefix"] else ""
    texts = command(f"pats-jax text2text {flags}{prefix} --output_dir {word(f'{folder}-texts')}")
    return [texts, "", *_writer(part, results, whole)]


def _writer(name: str, results: Values, whole: bool, is_repository: bool = False) -> list[str]:
    """How to load an encoder-decoder, or its adapter with the base model, and to let it write."""
    text, loader = repr(f"{results['source_prefix']}A text."), "from_pretrained_seq2seq"
    place, settings = repr(name), f"from_pretrained({name!r})"
    imports = ["from pats_jax import models", ""]
    if not whole:
        loader, settings = "peft.load_peft_seq2seq", f"from_dict({results['generation']})"
        if is_repository:
            imports = [
                "from huggingface_hub import snapshot_download",
                *imports,
                f"folder = snapshot_download({place})",
            ]
            place = "folder"
    lines = [
        "In Python, with JAX:",
        "",
        _python(
            *imports,
            f"model, params, config = models.{loader}({place})",
            f"tokenizer = models.load_tokenizer({place})",
            f"settings = models.GenerationConfig.{settings}",
            f'inputs = tokenizer([{text}], return_tensors="np")',
            'tokens = models.generate(model, params, inputs["input_ids"], inputs["attention_mask"], settings=settings)',
            "print(tokenizer.batch_decode(tokens, skip_special_tokens=True))",
        ),
    ]
    if not whole:
        return lines
    return [
        *lines,
        "",
        "With Transformers (torch):",
        "",
        _python(
            "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
            "",
            f"model = AutoModelForSeq2SeqLM.from_pretrained({name!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
            f'inputs = tokenizer([{text}], return_tensors="pt")',
            "print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True))",
        ),
    ]


_SERVICE = "As a service, by [Text Embeddings Inference](https://huggingface.co/docs/text-embeddings-inference):"


def _pipeline(name: str) -> str:
    return _python(
        "from transformers import pipeline",
        "",
        f'classify = pipeline("text-classification", model={name!r})',
        'print(classify("A text."))',
    )


def _serve(name: str) -> str:
    return command(
        f"text-embeddings-router --model-id {word(name)} --port 8080 &",
        "curl 127.0.0.1:8080/predict -H 'Content-Type: application/json' -d '{\"inputs\": \"A text.\"}'",
    )


def command(*lines: str) -> str:
    """A block of commands."""
    return markdown_block("\n".join(map(visible, lines)))


def _python(*lines: str) -> str:
    block = markdown_block("\n".join(map(visible, lines)))
    fence = block.partition("\n")[0]
    return block.replace(fence, f"{fence}python", 1)


def word(text: str) -> str:
    """A value quoted for the shell; a relative path that looks like a flag gets a leading ``./``."""
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
