"""A page that shows base and adapter side by side: both draw a prompt, live, and both answer a question about a picture.

    make demo
    python recipes/demo/app.py --port 7861
    python recipes/demo/app.py --base deepseek-community/Janus-Pro-1B --adapter YOUR_ADAPTER --temperature 1

Needs: pip install -c constraints.txt -e ".[recipes,demo]". Tested on two CPU cores with the tiny pair.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]  # the clone; a Space has the same folders
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT)]

import gradio as gr  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from demo.page import Page  # noqa: E402
from demo.port import listening  # noqa: E402
from scoring.contenders import check_sampling, sampling_of  # noqa: E402

PROMPTS = [
    "a red 3 at the top left and a blue 7 at the bottom right",
    "a green 8 at the top right",
    "a yellow 1 at the top left, a cyan 5 at the top right and a magenta 2 at the bottom left",
]
PICTURES = Path(__file__).parent / "pictures"
QUESTIONS = {
    "scene-1.png": "What digit is at the top right?",
    "scene-2.png": "What colour is the 2?",
    "scene-3.png": "How many digits are there?",
}
CSS = """
.gradio-container {max-width: 900px !important; margin: auto}
.picture {aspect-ratio: 1}
.picture img {width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated}
.told {min-height: 3.2em}
.told progress {width: 100%; accent-color: #0f766e}
"""


def build(page: Page, adapter: str) -> gr.Blocks:
    """The page in Gradio's components. One event at a time uses the models; the others wait in a queue."""
    alone = {"concurrency_limit": 1, "concurrency_id": "models", "show_progress": "minimal"}
    narrow = {"min_width": 130}  # two columns on a phone, too
    shown = {"interactive": False, "show_label": False, "buttons": [], "elem_classes": "picture"}
    with gr.Blocks(title="uc-adapters", analytics_enabled=False) as blocks:
        gr.Markdown("# Base beside adapter\nThe adapter reads and draws images in a quarter of the tokens.")
        with gr.Accordion("Adapter", open=False):
            adapter = gr.Textbox(adapter, label="Hub id or folder", info="An adapter of this base", max_length=500)
            load = gr.Button("Load", size="sm")
            facts = gr.Markdown()
            with gr.Row():
                codes, stride = page.ratios(adapter.value)
        with gr.Tab("Draw"):
            prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=2)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
            draw = gr.Button("Draw", variant="primary")
            drawn = []
            with gr.Row():
                for name in ("Base", "Adapter"):
                    with gr.Column(**narrow):
                        gr.Markdown(f"**{name}**")
                        told = gr.HTML(elem_classes="told", padding=False)
                        drawn += [gr.Image(format="png", **shown), told]
            gr.Examples([[text] for text in PROMPTS], prompt, label="Prompts")
        with gr.Tab("Ask"):
            with gr.Row():
                with gr.Column(**narrow):
                    picture = gr.Image(type="filepath", image_mode=None, format="png", **shown)
                with gr.Column(**narrow):
                    upload = gr.UploadButton("Upload a picture", file_types=["image"])
                    question = gr.Textbox(QUESTIONS["scene-1.png"], label="Question", lines=2)
                    ask = gr.Button("Ask", variant="primary")
            with gr.Row():
                answers = []
                for name in ("Base", "Adapter"):
                    with gr.Column(**narrow):
                        answers.append(gr.Textbox(label=f"{name} answers", interactive=False, lines=2))
            pairs = [[str(PICTURES / name), text] for name, text in QUESTIONS.items()]
            gr.Examples(pairs, [picture, question], label="Pictures and questions")
        load.click(page.describe, adapter, [facts, codes, stride], **alone)
        draw.click(page.draw, [prompt, seed, adapter, codes], drawn, show_progress_on=drawn[::2], **alone)
        ask.click(page.ask, [picture, question, adapter, stride], answers, **alone)
        upload.upload(page.upload, upload, picture)
    return blocks


def serve(blocks: gr.Blocks, port: int, wait: bool = True) -> None:
    """Serves the page. `GRADIO_SERVER_NAME=0.0.0.0` lets other machines see it.

    Args:
        blocks: The page.
        port: Its port.
        wait: Whether to serve until the process is ended. Default True; False returns at once.

    Raises:
        SystemExit: The port is taken.
    """
    listening(port).close()
    blocks.launch(
        server_port=port,
        prevent_thread_lock=not wait,
        show_error=True,
        max_file_size="30mb",
        run_history=False,
        ssr_mode=False,
        footer_links=["gradio"],
        theme=gr.themes.Default(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serves a page where base and adapter draw and answer side by side.")
    cards = ROOT / "model_cards"
    parser.add_argument("--base", default=str(cards / "tiny-janus"), help="the base: a folder or a Hub id")
    parser.add_argument("--adapter", default=str(cards / "tiny-janus-uc4x"), help="the adapter: a folder or a Hub id")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--temperature", type=float, default=0.7, help="of drawing; Janus-Pro: 1")
    parser.add_argument("--guidance_scale", type=float, help="of drawing; default: the base's own")
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", 7860)), help="of the page")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    check_sampling(args.temperature, args.guidance_scale, seed=0)
    listening(args.port).close()  # before anything is loaded
    transformers.logging.set_verbosity_error()  # Janus warns at every answer of a max_length that nobody set
    try:
        page = Page(args.base, args.device, **sampling_of(args.temperature, args.guidance_scale))
        page.adapter(args.adapter)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--base {args.base} with --adapter {args.adapter}: {error}") from None
    serve(build(page, args.adapter), args.port)


if __name__ == "__main__":
    main(arguments())
