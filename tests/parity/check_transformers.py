#!/usr/bin/env python3
"""Opens an exported folder as its readers on the Hub would, and compares it with what `tune` computes from the same.

    check_transformers.py --model DIR --logits L.safetensors --text T.txt [--tolerance 1e-3] [--ids 504,3575]
    check_transformers.py --card DIR

--model: transformers loads model, generation settings, tokenizer and chat template; the logits must be those of the
file (`tune logits`, ../e2e/README.md), and the text's first tokens those of --ids. --card: README.md must begin with
YAML that huggingface_hub reads, and render as tables, code and a picture that lies beside it, with no markup left over.
Prints one JSON object. Exit code 0: good. 1: something differs. 2: something cannot be read.
"""

import argparse
import json
import sys
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--card", type=Path)
    parser.add_argument("--logits", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--ids", type=lambda text: [int(part) for part in text.split(",")], default=[])
    parser.add_argument("--tolerance", type=float, default=1e-3)
    arguments = parser.parse_args()
    problems, result = [], {}
    if arguments.card:
        result |= check_card(arguments.card, problems)
    if arguments.model:
        result |= check_model(arguments, problems)
    print(json.dumps(result | {"problems": problems}))
    return 1 if problems else 0


def check_model(arguments, problems):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, told = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="eager", local_files_only=True,
        output_loading_info=True,
    )
    for what, names in told.items():
        if names:
            problems.append(f"{what}: {sorted(map(str, names))[:5]}")
    model.eval()
    ours = load_file(arguments.logits)
    largest = 0.0
    for name in sorted(name for name in ours if name.startswith("tokens_")):
        with torch.no_grad():
            got = model(ours[name].long()[None]).logits[0].double()
        want = ours[name.replace("tokens_", "logits_")].double()
        largest = max(largest, (got - want).abs().nan_to_num(float("inf")).max().item())
    if largest > arguments.tolerance:
        problems.append(f"logits differ by {largest}")

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    if arguments.ids:
        got = tokenizer(arguments.text.read_text(), add_special_tokens=False).input_ids[: len(arguments.ids)]
        if got != arguments.ids:
            problems.append(f"the text has the ids {got}, expected {arguments.ids}")
    generation = GenerationConfig.from_pretrained(arguments.model, local_files_only=True)
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    if tokenizer.eos_token_id not in ends:
        problems.append(f"generation ends at {ends}, the tokenizer's end is {tokenizer.eos_token_id}")
    if tokenizer.chat_template is None:
        problems.append("there is no chat template")
    else:
        chat = [{"role": "user", "content": "Hello"}]
        if "Hello" not in tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False):
            problems.append("the chat template loses what was said")
    shards = len(list(arguments.model.glob("*.safetensors")))
    return {"max_abs": largest, "files": shards, "end": ends}


def check_card(folder, problems):
    from html.parser import HTMLParser

    from huggingface_hub import ModelCard
    from markdown_it import MarkdownIt

    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    for key in ["library_name", "pipeline_tag", "tags"]:
        if key not in data:
            problems.append(f"the front matter has no {key}")
    html = MarkdownIt("commonmark").enable("table").render(card.text)

    class Page(HTMLParser):
        tags, pictures, inside, loose = [], [], [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)
            self.inside.append(tag)
            if tag == "img":
                self.pictures.append(dict(attributes)["src"])

        def handle_endtag(self, tag):
            self.inside.remove(tag)

        def handle_data(self, text):
            if "code" not in self.inside and any(sign in text for sign in ["|", "```", "**", "]("]):
                self.loose.append(text.strip())

    page = Page()
    page.feed(html)
    problems += [f"markup is left over: {text!r}" for text in page.loose]
    problems += [f"{picture} is not there" for picture in page.pictures if not (folder / picture).is_file()]
    counts = {tag: page.tags.count(tag) for tag in ["h1", "h2", "table", "td", "img", "pre"]}
    for tag in ["h1", "table", "pre"]:
        if counts[tag] == 0:
            problems.append(f"the page has no {tag}")
    return {"front_matter": data, "counts": counts}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:  # every library here has its own: one line, and the code that means "not comparable"
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
