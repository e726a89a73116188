"""BFCL's own checker, run in a process of its own: `python bfcl_official.py FOLDER < items > verdicts`

FOLDER holds the unpacked wheel of `bfcl-eval`. Its list of models, which imports every model's interface, is replaced by two
made-up ones: `plain`, and `underscores` for an interface without dots in names. The first line read is the list of categories, and
the first written is what the package's own loader finds in them. The second line holds the cases, each [category, functions,
accepted]. Each further line is [number of its case, answer, underscores], answered by [right?, kind of error or the exception's
name]; or [language, source, type, items' type], answered by the value that the source is converted to, as `repr` writes it.
"""
import contextlib, hashlib, json, sys
from types import ModuleType, SimpleNamespace

sys.path.insert(0, sys.argv[1])
models = ModuleType('bfcl_eval.constants.model_config')
models.MODEL_CONFIG_MAPPING = {name: SimpleNamespace(underscore_to_dot=name == 'underscores') for name in ('plain', 'underscores')}
sys.modules[models.__name__] = models

from bfcl_eval.constants.enums import Language
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
from bfcl_eval.eval_checker.ast_eval.type_convertor.java_type_converter import java_type_converter
from bfcl_eval.eval_checker.ast_eval.type_convertor.js_type_converter import js_type_converter
from bfcl_eval.utils import is_empty_output, is_function_calling_format_output, is_java, is_js, load_dataset_entry, load_ground_truth_entry


def loaded(category):
    "Number and digest of the cases: id, functions, accepted answers"
    questions = load_dataset_entry(category, include_prereq=False, include_language_specific_hint=False)
    answers = [a['ground_truth'] for a in load_ground_truth_entry(category)] if not category.endswith('relevance') else [[]]*len(questions)
    rows = [[q['id'], q['function'], a] for q, a in zip(questions, answers, strict=True)]
    return [len(rows), hashlib.sha256(json.dumps(rows).encode()).hexdigest()]


def verdict(category, functions, accepted, answer, underscores):
    "Right or not, and the error's kind"
    if category.endswith('relevance'):
        right = is_empty_output(answer) == category.endswith('irrelevance')
        return right, '' if right else 'relevance'
    assert is_function_calling_format_output(answer)
    language = Language.JAVA if is_java(category) else Language.JAVASCRIPT if is_js(category) else Language.PYTHON
    try: out = ast_checker(functions, answer, accepted, language, category, 'underscores' if underscores else 'plain')
    except Exception as e: return False, type(e).__name__
    return out['valid'], '' if out['valid'] else out['error_type']


def converted(language, source, type, inner):
    "The value a source is converted to; '' where that fails"
    try: return repr({'java': java_type_converter, 'javascript': js_type_converter}[language](source, type, inner))
    except Exception: return ''


def main():
    lines, out = sys.stdin, sys.stdout
    with contextlib.redirect_stdout(sys.stderr):   # the checker prints
        print(json.dumps({c: loaded(c) for c in json.loads(next(lines))}), file=out)
        cases = json.loads(next(lines))
        for line in lines:
            k, *rest = json.loads(line)
            print(json.dumps(converted(k, *rest) if isinstance(k, str) else verdict(*cases[k], *rest)), file=out)


main()
