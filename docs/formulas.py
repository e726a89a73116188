"Formulas as MathML, which browsers show by themselves: no script, and nothing to load"
import re
from html import escape

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util.logging import getLogger


def mathml(
    tex:str,
    block=False, # on a line of its own
)->str:
    "A formula in LaTeX as MathML; raises `ValueError` for a command that is not known"
    text = convert(tex, display='block' if block else 'inline')
    if unknown := re.findall(r'>(\\\w*)<', text): raise ValueError(f'unknown commands {", ".join(unknown)}')
    return re.sub(r'(<mi>(?:log|exp|max|min|cos)</mi>)(?=<m(?!o))', r'\1<mspace width="0.17em" />', text)   # "log p", not "logp"


def shown(node, block=False)->str:
    "A formula of a page; one that cannot be shown as MathML is named, and shown as it is written"
    try: return mathml(node.astext(), block)
    except Exception as e:   # of whatever kind: the converter meets what it does not know in many ways
        getLogger(__name__).warning('%s: %s in the formula %r', type(e).__name__, e, node.astext(), location=node)
        return f'<code>{escape(node.astext())}</code>'


def show_inline(translator, node):
    translator.body.append(shown(node))
    raise SkipNode


def show_block(translator, node):
    translator.body.append(f'<div class="math">{shown(node, block=True)}</div>')
    raise SkipNode


def add_mathml(app):
    "Make it one of Sphinx's ways to show formulas"
    app.add_html_math_renderer('mathml', (show_inline, None), (show_block, None))
