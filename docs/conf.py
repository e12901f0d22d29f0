"""Sphinx's settings: Markdown pages by MyST, the furo theme, and an API page for each folder of the package."""

import pkgutil
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring

import dar_lightning

project = "dar_lightning"
author = "The dar_lightning authors"
copyright = f"{author}. Apache License 2.0"
version = release = dar_lightning.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = True
# Other libraries' classes, whose pages are elsewhere; and names that only type checkers see.
nitpick_ignore_regex = [
    ("py:.*", r"(abc|collections|datetime|pathlib|threading)\..*"),
    ("py:.*", r"(torch|torchmetrics|lightning|jsonargparse|huggingface_hub|numpy|PIL|tensorboard|matplotlib)\..*"),
    ("py:class", r"Dataset|Sampler|_T_co|_collate_fn_t|_worker_init_fn_t"),  # of torch's DataLoader
    ("py:class", r"dar_lightning\.(.*\._\w+|weights\.lightning\.Model)"),  # private base classes; a type variable
]

myst_heading_anchors = 3  # so that pages can link to each other's headings

default_role = "code"  # docstrings have `names` in single backticks, as Markdown
add_module_names = False
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 100
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
napoleon_use_rtype = False  # what stands before the colon of "Returns:" is a shape as often as a type
autodoc_default_options = {"members": True, "show-inheritance": True, "ignore-module-all": True}
# "Key/value heads: num_kv_heads, or num_heads." of a property is a sentence, not a type and what it is.
GoogleDocstring._consume_inline_attribute = lambda self: ("", self._consume_to_end())

html_theme = "furo"
html_title = "dar_lightning"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True


def write_api_pages(app: Sphinx) -> None:
    """A page for each folder of the package, with all of its modules: api/NAME.rst, which git ignores."""
    packages = {"dar_lightning": []}
    for module in pkgutil.walk_packages(dar_lightning.__path__, "dar_lightning."):
        if module.ispkg:
            packages[module.name] = []
        elif not module.name.endswith("__main__"):
            packages[module.name.rpartition(".")[0]].append(module.name)
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    for page in folder.glob("*.rst"):
        if page.stem not in packages:
            page.unlink()
    for package, modules in packages.items():
        lines = [package, "=" * len(package), "", f".. automodule:: {package}", ""]
        for module in modules:
            lines += [module, "-" * len(module), "", f".. automodule:: {module}", ""]
        page, text = folder / f"{package}.rst", "\n".join(lines)
        if not page.exists() or page.read_text() != text:  # an unchanged page is not built again
            page.write_text(text)


def readable_defaults(app, what, name, obj, options, signature, returns) -> tuple[str | None, str | None]:
    """A dataclass's `<factory>` is no Python, and Sphinx could not read the signature that it stands in."""
    return signature and signature.replace("<factory>", "..."), returns


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", readable_defaults)
    app.connect("builder-inited", write_api_pages)
