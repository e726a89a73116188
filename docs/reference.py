"The reference, out of the exported modules: every public name with its docstring, its docments, and the cell that defines it"
import ast, copy, io, re, tokenize
from dataclasses import dataclass, field
from pathlib import Path

FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


@dataclass
class Parameter:
    "One row of a table"
    name: str
    type: str = ''
    default: str = ''
    comment: str = ''   # its docment


@dataclass
class Entry:
    "A public name of a module"
    kind: str           # of Sphinx's Python domain: 'function', 'class', 'exception', 'method', 'property' or 'data'
    name: str           # with its class in front
    notebook: str
    cell: str           # the id of the one that defines it
    signature: str = ''
    text: str = ''      # the docstring; of data, its comment
    rows: list = field(default_factory=list)   # of `Parameter`
    bases: tuple = ()   # of a class
    value: str = ''     # of data


class Module:
    "An exported module as it is written; it is never imported"
    def __init__(self, path:Path):
        self.path, self.source = path, path.read_text(encoding='utf-8')
        self.tree, self.name, self.lines = ast.parse(self.source), path.stem, self.source.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(self.source).readline)
        self.comments = {t.start[0]: re.sub(r'^# ?', '', t.string).strip() for t in tokens if t.type == tokenize.COMMENT}
        self.about = ast.get_docstring(self.tree) or ''
        self.public = next((ast.literal_eval(n.value) for n in self.tree.body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__'), [])

    def cell(self, line:int)->tuple: # (notebook, id)
        "Where a line was exported from"
        for text in reversed(self.lines[:line]):
            if m := re.match(r'# %% \.\./nbs/(\S+)\.ipynb #(\S+)', text): return m.groups()
        return '', ''

    def docment(self,
        node,   # a parameter, or its default
        others, # all of the function's, and what it returns
    )->str:
        "The comment of a line, if the parameter is the last one there"
        line = node.end_lineno
        return '' if any(o.end_lineno == line and o.end_col_offset > node.end_col_offset for o in others) else self.comments.get(line, '')


def unparse(node)->str:
    "The code of a node, '' where there is none"
    return ast.unparse(node) if node is not None else ''


def parameters(module:Module, f)->list: # of `Parameter`, what is returned last
    "A function's parameters, with type, default and docment"
    a = f.args
    every = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    defaults = dict(zip([x.arg for x in (*a.posonlyargs, *a.args)][::-1], a.defaults[::-1])) | dict(zip([x.arg for x in a.kwonlyargs], a.kw_defaults))
    stars = {id(a.vararg): '*', id(a.kwarg): '**'}
    ends = [*(defaults.get(x.arg) or x for x in every), *filter(None, [f.returns])]
    rows = [Parameter(stars.get(id(x), '') + x.arg, unparse(x.annotation), unparse(defaults.get(x.arg)), module.docment(end, ends)) for x, end in zip(every, ends)]
    back = [Parameter('returns', unparse(f.returns), '', module.comments.get(f.returns.end_lineno, ''))] if f.returns else []
    return [r for r in rows if r.name not in ('self', 'cls')] + back


def signature(f)->str:
    "Names and defaults; the types stand in the table"
    a = copy.deepcopy(f.args)
    for x in ast.walk(a):
        if isinstance(x, ast.arg): x.annotation = None
    first = a.posonlyargs or a.args
    if first and first[0].arg in ('self', 'cls'): del first[0]
    return f'({ast.unparse(a)})'


def decorators(node)->list: return [ast.unparse(d) for d in node.decorator_list]


def function_entry(module:Module, f, owner='')->Entry:
    "A function, or a class's method or property"
    is_property = {'property', 'cached_property', 'patch(as_prop=True)'} & {*decorators(f)}
    kind = 'property' if is_property else 'method' if owner else 'function'
    return Entry(kind, f'{owner}.{f.name}' if owner else f.name, *module.cell(f.lineno), '' if is_property else signature(f), ast.get_docstring(f) or '', parameters(module, f))


def fields(module:Module, c)->list: # of `Parameter`
    "The fields of a dataclass or a named tuple, and what else a class says of its attributes"
    def of(n, target): return Parameter(ast.unparse(target), unparse(getattr(n, 'annotation', None)), unparse(n.value), module.comments.get(n.end_lineno, ''))
    rows = [of(n, n.target if isinstance(n, ast.AnnAssign) else n.targets[0]) for n in c.body if isinstance(n, (ast.AnnAssign, ast.Assign))]
    return [r for r in rows if r.type or r.comment]


def class_entries(module:Module, c)->list:
    "A class with what makes one, then its public methods"
    made = next((f for f in c.body if isinstance(f, FUNCTIONS) and f.name == '__init__'), None)
    bases, rows = tuple(map(ast.unparse, c.bases)), [*(parameters(module, made) if made else ()), *fields(module, c)]
    kind = 'exception' if c.name.endswith('Error') or any(b.endswith('Error') for b in bases) else 'class'
    own = Entry(kind, c.name, *module.cell(c.lineno), signature(made) if made else '', ast.get_docstring(c) or '', rows, bases)
    return [own, *(function_entry(module, f, c.name) for f in c.body if isinstance(f, FUNCTIONS) and is_public(f.name))]


def is_public(name)->bool: return not name.startswith('_') or name == '__call__'


def patched(f)->str:
    "The class that a function is patched into, '' if it is none"
    return ast.unparse((f.args.posonlyargs + f.args.args)[0].annotation) if any(d.partition('(')[0] == 'patch' for d in decorators(f)) else ''


def assigned(node)->list: # of (name, value)
    "What an assignment gives names to"
    pairs = []
    for t in node.targets:
        if isinstance(t, ast.Name): pairs.append((t.id, node.value))
        elif isinstance(t, ast.Tuple) and isinstance(node.value, ast.Tuple): pairs += [(x.id, v) for x, v in zip(t.elts, node.value.elts) if isinstance(x, ast.Name)]
    return pairs


def data_entry(module:Module, node, name:str, value)->Entry:
    "A constant with its comment, and its value unless that is long"
    text = ast.unparse(value)
    return Entry('data', name, *module.cell(node.lineno), text=module.comments.get(node.end_lineno, ''), value=text if len(text) <= 300 else '')


def entries(module:Module)->list: # of `Entry`, in the order of the notebook
    "All public names of a module, and the methods that it patches into classes"
    out = []
    for n in module.tree.body:
        if isinstance(n, ast.ClassDef) and n.name in module.public: out += class_entries(module, n)
        elif isinstance(n, FUNCTIONS) and (owner := patched(n)): out += [function_entry(module, n, owner)] if is_public(n.name) and is_public(owner) else []
        elif isinstance(n, FUNCTIONS) and n.name in module.public: out.append(function_entry(module, n))
        elif isinstance(n, ast.Assign): out += [data_entry(module, n, name, value) for name, value in assigned(n) if name in module.public]
    return [*{e.name: e for e in reversed(out)}.values()][::-1]   # of a name that is assigned twice the last


def linked(text:str, home:dict)->str:
    "Code, with a link to the class or constant that it names"
    text = ' '.join(text.split())
    name = text.strip('\'"').rpartition('.')[2]
    if name in home: return f'{{py:obj}}`{name} <sage_paper.{home[name]}.{name}>`'
    return f'`{text}`'.replace('|', r'\|') if text else ''


def plain(text:str, home:dict)->str:
    "A comment, with nothing outside its code spans that Markdown would read as a mark"
    parts = re.split(r'`([^`]*)`', ' '.join(text.split()))
    return ''.join(linked(p, home) if k % 2 else re.sub(r'([\\*_$\[\]<>{}|#~^])', r'\\\1', p) for k, p in enumerate(parts))


def page(
    module:Module,
    home:dict, # class or constant → module
)->str: # Markdown
    "The page of a module"
    listed = entries(module)
    notebook = next((e.notebook for e in listed if e.notebook), '')
    head = [f'# {module.name}', '', f'> {module.about}', '', f'`sage_paper.{module.name}`, from [its notebook](../nbs/{notebook}.ipynb)', '', f'```{{py:module}} sage_paper.{module.name}\n```', '']
    return '\n'.join([*head, *(show(e, home) for e in listed)])


def row(r:Parameter, home:dict)->str:
    "A parameter as a row of a table"
    return f'| {"*returns*" if r.name == "returns" else linked(r.name, {})} | {linked(r.type, home)} | {linked(r.default, {})} | {plain(r.comment, home)} |'


def show(e:Entry, home:dict)->str:
    "An entry as a directive of Sphinx's Python domain"
    lines = [f'````{{py:{e.kind}}} {e.name}{e.signature}', '', plain(e.text, home), '']
    if e.bases: lines += ['Builds on ' + ', '.join(linked(b, home) for b in e.bases) + '.', '']
    if any(r.type or r.comment for r in e.rows): lines += ['| | type | default | |', '|---|---|---|---|', *(row(r, home) for r in e.rows), '']
    if e.value: lines += ['```python', e.value, '```', '']
    return '\n'.join([*lines, f'[source](#cell-{e.cell})', '````', ''])


def reference(
    package:Path, # the folder of the exported modules
    order:list,   # their names, as they are to be read
)->dict: # name of a page → its Markdown
    "All pages, and one that lists them"
    modules = [Module(package/f'{name}.py') for name in order]
    names = [(name, m.name) for m in modules for name in m.public if name[0].isupper()]
    home = {name: m for name, m in names if sum(name == other for other, _ in names) == 1}
    table = [f'| [{m.name}]({m.name}.md) | {plain(m.about, {})} |' for m in modules]
    tree = ['```{toctree}', ':hidden:', '', *order, '```', '']
    index = ['# Reference', '', 'What the notebooks export, in their order. A comment behind a parameter in the code is its description here.', '', '| module | |', '|---|---|', *table, '', *tree]
    return {'index': '\n'.join(index)} | {m.name: page(m, home) for m in modules}
