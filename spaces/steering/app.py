"""The Gradio Space: look inside a Matryoshka SAE and steer its language model.

`python app.py` is how a Space starts it, and `hf-msae demo` and `hf-msae space run` do the same.
"""

from msae_space.look import launch_options
from msae_space.page import build
from msae_space.settings import read_settings

demo = build(read_settings())

if __name__ == "__main__":
    demo.launch(**launch_options())
