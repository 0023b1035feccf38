"""How the page looks: a theme, and a style sheet beside this file."""

import importlib.util
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from msae_space.gate import Gate

# Visitors whose state is kept; those who came back the longest ago begin anew.
NUM_SESSIONS = 200
FOLDER = Path(__file__).resolve().parent
FONTS = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
MONO_FONTS = ["ui-monospace", "Menlo", "Consolas", "monospace"]


def launch_options() -> dict[str, Any]:
    """What Gradio 6 takes at launch. Where `mcp` is installed, agents find the page's functions as tools."""
    return {
        "mcp_server": importlib.util.find_spec("mcp") is not None,
        "theme": _theme(),
        "css_paths": [FOLDER / "page.css"],
        "ssr_mode": False,
        "footer_links": [],
        "state_session_capacity": NUM_SESSIONS,
        "enable_monitoring": False,
        "app_kwargs": {"middleware": [Middleware(Gate)]},
    }


def _theme() -> gr.themes.Base:
    """Labels and fields on the bare page, so that everything begins at the same line.

    The fonts are the visitor's own, so that the page asks no other machine.
    """
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=MONO_FONTS)
    return theme.set(
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_padding="0px",
        block_shadow="none",
        block_title_text_size="13px",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_color_focus="*primary_600",
        input_radius="6px",
        button_large_radius="6px",
        button_large_padding="8px 16px",
        button_large_text_size="*text_md",
        button_large_text_weight="550",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_border_color="*primary_700",
        button_primary_border_color_dark="*primary_700",
        button_primary_text_color="white",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
        slider_color="*primary_700",
        slider_color_dark="*primary_600",
    )
