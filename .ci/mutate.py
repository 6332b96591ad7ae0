#!/usr/bin/env python3
"""Changes bayeux_server.py at random, one place at a time, and tells which changes no test notices.

    python .ci/mutate.py                            300 changes; it takes about half an hour
    python .ci/mutate.py --section 10 --section 11  only these sections
    python .ci/mutate.py --locks                    also takes away each lock, one by one
    python .ci/mutate.py --list --section 2         all possible changes of a section; nothing is run
    python .ci/mutate.py --mutant 2618.12-compare   one of them, by its id; or all of a line: --mutant 2618
    python .ci/mutate.py --output results.jsonl     keeps the results; the same command goes on where it stopped
    python .ci/mutate.py --again results.jsonl      tries the survivors of these results again, on the present files

A changed module is a *mutant*. A test that fails *notices* it; a mutant that no test notices *survives*. A survivor
is a gap between the tests, or it is *equivalent*: it does the same as the module. Equivalent mutants are listed, with
the reason, in mutate_equivalents.txt beside this program; they are neither run nor counted.

First the whole suite runs twice: once to time each test, and once to record which lines each test runs, on all
threads and in most processes that it starts. Both results are kept until one of the two files changes. Then each
mutant meets only the tests that run its lines, in a copy of the tree: first up to 120 that are short and run little
else, then all others. A mutant that hangs is noticed. A constant is run by the tests that run the lines which use it.

Exit status 1 if less than 95 % of the mutants are noticed. pytest and coverage are installed into an environment of
their own if this Python lacks them.
"""
from __future__ import annotations

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import faulthandler
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
EQUIVALENTS = pathlib.Path(__file__).with_name("mutate_equivalents.txt")
MODULE, TESTS = "bayeux_server.py", "test_bayeux_server.py"
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "bayeux_server_mutate"
NOT_COPIED = shutil.ignore_patterns(".git", "node_modules", ".*_cache")
FIRST_TESTS = 120           # of a mutant; collecting few tests is much faster than collecting all
LEAST_OF_SECTION = 12       # mutants, however short the section is
LEAST_NOTICED = 0.95        # a smaller share of the mutants is a failure
TEST_PATIENCE = 60          # seconds that a test may take, beside ten times its usual time
SYMBOLS = {ast.Lt: "< <=", ast.LtE: "<= <", ast.Gt: "> >=", ast.GtE: ">= >", ast.Eq: "== !=", ast.NotEq: "!= ==",
           ast.Is: "is is_not", ast.IsNot: "is_not is", ast.In: "in not_in", ast.NotIn: "not_in in",
           ast.And: "and or", ast.Or: "or and", ast.Add: "+ -", ast.Sub: "- +"}
LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical", "log", "log_later"}


# ---------------------------------------------------------------------------------------
# The mutants

class Mutant(NamedTuple):
    """One change: the bytes from begin to end become text."""
    section: str            # the number, as the heading has it
    place: str              # the function or class, with its outer ones
    kind: str
    line: int
    column: int
    begin: int
    end: int
    text: str
    lines: frozenset        # the lines whose tests are to notice it
    old: str                # the lines as they are, without the spaces at their beginnings and ends
    new: str

    @property
    def id(self):
        return f"{self.line}.{self.column}-{self.kind}"

    @property
    def key(self):
        """The name of the mutant that survives other changes of the file."""
        return self.place, self.old, self.new

    def __str__(self):
        return f"# {self.id}\n[{self.place}]\n- {self.old}\n+ {self.new}"


class Finder(ast.NodeVisitor):
    """Collects all mutants of a source text, by a walk through its syntax tree."""

    def __init__(self, source):
        self.source = source
        self.starts = [0, *itertools.accumulate(len(line) for line in source.splitlines(keepends=True))]
        headings = re.finditer(rb"^# \xc2\xa7(\d+) +(.*\S)", source, re.MULTILINE)
        self.titles = {match[1].decode(): (source[:match.start()].count(b"\n") + 1, match[2].decode())
                       for match in headings}
        self.tree = ast.parse(source)
        self.mutants = {}
        self.scopes = []            # the functions and classes around the present node
        self.statement = None       # the innermost one
        self.locks = {self.name_of(target) for node in ast.walk(self.tree)
                      if isinstance(node, (ast.Assign, ast.AnnAssign))
                      for target in getattr(node, "targets", [getattr(node, "target", None)])
                      if isinstance(node.value, ast.Call)
                      and self.name_of(node.value.func) in ("Lock", "RLock", "Condition")}
        self.uses = collections.defaultdict(list)       # by name, the statements that use it
        self.index_uses(self.tree, None, None)
        self.visit(self.tree)

    @staticmethod
    def name_of(node):
        return getattr(node, "attr", None) or getattr(node, "id", None)

    def index_uses(self, node, statement, function):
        for child in ast.iter_child_nodes(node):
            inner = child if isinstance(child, ast.stmt) else statement
            if self.name_of(child) and isinstance(child.ctx, ast.Load):
                self.uses[self.name_of(child)].append((inner, function))
            self.index_uses(child, inner, child if isinstance(child, (ast.FunctionDef, ast.Lambda)) else function)

    # -- Places ----------------------------------------------------------------------------

    def span(self, node):
        return (self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset)

    def text_of(self, node):
        begin, end = self.span(node)
        return self.source[begin:end].decode()

    def line_at(self, position):
        return self.source.count(b"\n", 0, position) + 1

    @staticmethod
    def header(statement):
        """The lines of a statement, without those of the statements inside it."""
        body = getattr(statement, "body", None)
        last = max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno
        return range(statement.lineno, last + 1)

    def lines_to_test(self, statement):
        if isinstance(statement, ast.FunctionDef):      # a decorator, or a default
            return set(range(statement.lineno, statement.end_lineno + 1))
        if any(isinstance(scope, ast.FunctionDef) for scope in self.scopes):
            return set(self.header(statement))
        return self.lines_of_users(statement, set())

    def lines_of_users(self, statement, seen):
        """Whoever imports the module runs such a statement; so its tests are those of the lines that use its names."""
        lines = set()
        stored = [node for node in ast.walk(statement) if self.name_of(node) and isinstance(node.ctx, ast.Store)]
        for name in {self.name_of(node) for node in stored} - seen:
            seen.add(name)
            for user, function in self.uses[name]:
                if function is None:
                    lines |= self.lines_of_users(user, seen)
                elif isinstance(user, ast.FunctionDef):
                    lines |= set(range(user.lineno, user.end_lineno + 1))
                else:
                    lines |= set(self.header(user))
        return lines

    def add(self, kind, begin, end, text, whole_end=None):
        """Note a mutant; whole_end is the end of the lines that its listing shows."""
        line = self.line_at(begin)
        section = [number for number, (first, _) in self.titles.items() if first <= line]
        if not section:             # the imports
            return
        column = begin - self.starts[line - 1]
        left, right = self.starts[line - 1], self.source.find(b"\n", whole_end or end)
        old = self.source[left:right].decode()
        new = (self.source[left:begin] + text.encode() + self.source[end:right]).decode()
        place = ".".join(scope.name for scope in self.scopes) or "module"
        mutant = Mutant(section[-1], place, kind, line, column, begin,
                        end, text, frozenset(self.lines_to_test(self.statement)), " ".join(old.split()),
                        " ".join(new.split()))
        if mutant.old != mutant.new:
            self.mutants.setdefault(mutant.id, mutant)

    def replace(self, kind, node, text, **more):
        self.add(kind, *self.span(node), text, **more)

    def swap(self, kind, operator, begin, end):
        """Exchange the operator that stands between two positions."""
        if type(operator) in SYMBOLS:
            old, new = SYMBOLS[type(operator)].split()
            pattern = re.escape(old).replace("_", r"\s+")
            pattern = rf"\b{pattern}\b" if old[0].isalpha() else pattern
            match = re.search(pattern.encode(), self.source[begin:end])
            if match:
                self.add(kind, begin + match.start(), begin + match.end(), new.replace("_", " "))

    # -- The walk --------------------------------------------------------------------------

    def visit(self, node):
        if isinstance(node, ast.stmt):
            outer, self.statement = self.statement, node
            self.delete_statement(node)
            super().visit(node)
            self.statement = outer
        else:
            super().visit(node)

    def visit_all(self, *nodes):
        for node in nodes:
            if node is not None:
                self.visit(node)

    def visit_body(self, node):
        self.scopes.append(node)
        begin = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
        self.visit_all(*node.body[begin:])      # without the docstring
        self.scopes.pop()

    def visit_Module(self, node):
        self.visit_all(*node.body[1:])

    def visit_ClassDef(self, node):
        self.visit_all(*node.decorator_list)
        self.visit_body(node)

    def visit_FunctionDef(self, node):
        if node.name == "__repr__":
            return
        self.scopes.append(node)
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if isinstance(default, ast.Constant) and default.value is None:
                self.replace("default", default, "0")
            elif default is not None:
                self.visit(default)
        self.visit_all(*node.decorator_list)
        self.scopes.pop()
        self.visit_body(node)

    def visit_Assign(self, node):
        if not any(self.name_of(target) in ("__slots__", "__all__", "__version__") for target in node.targets):
            self.visit(node.value)

    def visit_AnnAssign(self, node):
        self.visit_all(node.value)

    def visit_Assert(self, node):
        pass

    def visit_JoinedStr(self, node):
        pass                    # old Pythons know no positions inside; such a text is mostly for people

    def visit_AugAssign(self, node):
        self.swap("sum", node.op, self.span(node.target)[1], self.span(node.value)[0])
        self.generic_visit(node)

    def visit_BinOp(self, node):
        self.swap("sum", node.op, self.span(node.left)[1], self.span(node.right)[0])
        self.generic_visit(node)

    def visit_Compare(self, node):
        operands = [node.left, *node.comparators]
        for operator, left, right in zip(node.ops, operands, operands[1:]):
            self.swap("compare", operator, self.span(left)[1], self.span(right)[0])
            for side in (left, right):
                self.change_text(side)
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        for left, right in zip(node.values, node.values[1:]):
            self.swap("and-or", node.op, self.span(left)[1], self.span(right)[0])
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.Not):
            self.replace("not", node, f"({self.text_of(node.operand)})")
        self.generic_visit(node)

    def force(self, test):
        if not isinstance(test, ast.Constant):
            self.replace("true", test, "True")
            self.replace("false", test, "False")

    def visit_If(self, node):
        self.force(node.test)
        self.generic_visit(node)

    visit_While = visit_IfExp = visit_If

    def visit_comprehension(self, node):
        for test in node.ifs:
            self.force(test)
        self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, bool):
            self.replace("flip", node, str(not node.value))
        elif isinstance(node.value, (int, float)):
            self.replace("plus-one", node, str(node.value + 1))
            if node.value:
                self.replace("zero", node, "0")
        elif isinstance(node.value, bytes):
            self.change_text(node)

    def change_text(self, node):
        """Change a text that leaves or comes in: bytes, and names of fields.  Only literals of one simple part."""
        if isinstance(node, ast.Constant) and isinstance(node.value, (bytes, str)):
            text = self.text_of(node)
            if re.fullmatch(r"""b?(["'])[^"'\\]+\1""", text):
                self.replace("wire", node, text[:-1] + "x" + text[-1])

    def visit_Dict(self, node):
        for key in node.keys:
            self.change_text(key)
        self.generic_visit(node)

    def visit_Subscript(self, node):
        self.change_text(node.slice)
        self.generic_visit(node)

    def visit_Call(self, node):
        if isinstance(node.func, ast.Attribute) and node.func.attr in LOG_METHODS:
            return
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop", "startswith") and node.args:
            self.change_text(node.args[0])
        for keyword in node.keywords:
            if keyword.arg:
                begin, end = self.span(keyword)
                before = re.search(rb",\s*$", self.source[:begin])
                after = re.match(rb"\s*,\s*", self.source[end:])
                if before:
                    begin = before.start()
                elif after:
                    end += after.end()
                self.add("keyword", begin, end, "")
        self.generic_visit(node)

    def visit_Return(self, node):
        if node.value is None:
            return
        if not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.replace("none", node.value, "None")
        function = [scope for scope in self.scopes if isinstance(scope, ast.FunctionDef)][-1]
        if self.name_of(function.returns) == "bool" or isinstance(node.value, (ast.Compare, ast.BoolOp)):
            self.replace("negate", node.value, f"not ({self.text_of(node.value)})")
        self.visit(node.value)

    def visit_With(self, node):
        for item in node.items:
            if self.name_of(item.context_expr) in self.locks:
                end = self.starts[node.body[0].lineno] - 1      # show what it guards: many lines read alike
                self.replace("lock", item.context_expr, "contextlib.nullcontext()", whole_end=end)
        self.generic_visit(node)

    def delete_statement(self, node):
        """Put pass in the place of a statement, unless a name would then plainly be missing."""
        function = next((scope for scope in reversed(self.scopes) if isinstance(scope, ast.FunctionDef)), None)
        if function is None or function is not self.scopes[-1]:
            return
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            names = collections.Counter(self.name_of(each) for each in ast.walk(function)
                                        if isinstance(each, (ast.Name, ast.Attribute))
                                        and isinstance(each.ctx, ast.Store))
            targets = [each for target in getattr(node, "targets", [getattr(node, "target", None)])
                       for each in getattr(target, "elts", [target])]
            is_needed = any(names[each.id] == 1 for each in targets if isinstance(each, ast.Name))
            if is_needed or node.value is None or function.name == "__init__":
                return
        elif isinstance(node, ast.Return):
            if node is function.body[-1]:
                return
        elif not (isinstance(node, (ast.AugAssign, ast.Raise, ast.Continue, ast.Break, ast.Delete))
                  or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            return
        self.replace("delete", node, "pass")


def choose(mutants, count, randomness, lengths):
    """So many mutants at random: of each section in proportion to its lines, yet not too few; of many lines."""
    by_section = collections.defaultdict(list)
    for mutant in mutants:
        by_section[mutant.section].append(mutant)
    shares, open_sections = {}, set(by_section)
    while True:                 # short sections get the least number; the others share the rest
        rest = count - sum(shares.values())
        total = sum(lengths[section] for section in open_sections) or 1
        short = {section for section in open_sections if rest * lengths[section] / total < LEAST_OF_SECTION}
        shares.update(dict.fromkeys(short, LEAST_OF_SECTION))
        open_sections -= short
        if not short:
            break
    shares.update({section: round(rest * lengths[section] / total) for section in open_sections})
    chosen = []
    for section, candidates in by_section.items():
        randomness.shuffle(candidates)
        of_line = collections.Counter()
        order = []
        for mutant in candidates:
            of_line[mutant.line] += 1
            order.append((of_line[mutant.line], len(order), mutant))
        chosen += [mutant for _, _, mutant in sorted(order)[:shares[section]]]
    return chosen


# ---------------------------------------------------------------------------------------
# One run of pytest, in a process of its own

class RunPlugin:
    """Chooses and orders the tests, times them, ends one that hangs, and names the test to coverage."""

    def __init__(self, job, coverage):
        self.coverage = coverage
        self.tests = {test: number for number, test in enumerate(job["tests"] or [])}
        self.limits = job["limits"]
        self.names = {test.partition("[")[0] for test in self.tests}
        self.names |= {name.rpartition("::")[0] for name in self.names}
        self.seconds, self.failed, self.all = {}, [], not self.tests

    def pytest_pycollect_makeitem(self, collector, name, obj):
        is_wanted = self.all or not re.match("[Tt]est", name) or f"{collector.nodeid}::{name}" in self.names
        return None if is_wanted else []

    def pytest_collection_modifyitems(self, items):
        if not self.all:
            items[:] = sorted((item for item in items if item.nodeid in self.tests),
                              key=lambda item: self.tests[item.nodeid])

    def begin(self, item):
        os.environ["MUTATE_TEST"] = item.nodeid         # processes that the test starts record under this name, too
        if self.coverage:
            self.coverage.switch_context(item.nodeid)
            for value in list(vars(sys.modules["bayeux_server"]).values()):
                if hasattr(value, "cache_clear"):       # or only the first test would run such a function
                    value.cache_clear()
        limit = TEST_PATIENCE + 10 * self.limits.get(item.nodeid, TEST_PATIENCE)
        faulthandler.dump_traceback_later(limit, exit=True)
        return time.monotonic()

    def end(self, item, began):
        faulthandler.cancel_dump_traceback_later()
        self.seconds[item.nodeid] = round(time.monotonic() - began, 3)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)


def run_job(path):
    """What the process does: it runs the tests that the file names, and writes the outcome beside it."""
    import pytest

    job = json.loads(path.read_text())
    measured = None
    if job["coverage"]:
        import coverage
        measured = coverage.Coverage(data_file=job["coverage"] + ".main", config_file=False, branch=False,
                                     include=[str(pathlib.Path.cwd() / MODULE)])
        measured.start()

    class Plugin(RunPlugin):
        @pytest.hookimpl(hookwrapper=True)
        def pytest_runtest_protocol(self, item):
            began = self.begin(item)
            yield
            self.end(item, began)

    plugin = Plugin(job, measured)
    arguments = ["-q", "-p", "no:cacheprovider", "--basetemp=" + job["temporary"], *job["options"], TESTS]
    status = pytest.main(arguments, plugins=[plugin])
    if measured:
        measured.stop()
        measured.save()
    outcome = {"seconds": plugin.seconds, "failed": plugin.failed}
    path.with_suffix(".outcome").write_text(json.dumps(outcome))
    sys.stdout.flush()
    os._exit(status)            # threads that a mutant left behind hold nothing up


class Run(NamedTuple):
    status: int | None          # None: it was ended
    output: str
    seconds: dict
    failed: list


def run_tests(tree, tests=None, limits=None, options=(), time_limit=None, coverage=None):
    """Run tests in a tree.  All processes that this starts are ended with it."""
    path = tree.parent / (tree.name + ".job")
    outcome, log = path.with_suffix(".outcome"), path.with_suffix(".log")
    outcome.unlink(missing_ok=True)
    path.write_text(json.dumps({"tests": tests, "limits": limits or {}, "options": list(options), "coverage": coverage,
                                "temporary": str(tree.parent / (tree.name + ".temporary"))}))
    environment = {**os.environ, "PYTHONPATH": "", "PYTEST_ADDOPTS": "", "COVERAGE_CORE": "ctrace"}
    environment.pop("PYTHONPATH")
    if coverage:
        settings = pathlib.Path(coverage).parent / "settings"
        settings.write_text("[run]\nbranch = False\nparallel = True\nsigterm = True\ncontext = ${MUTATE_TEST-}\n"
                            f"data_file = {coverage}.child\ninclude = {tree / MODULE}\n")
        hook = settings.with_name("hook")
        hook.mkdir(exist_ok=True)
        (hook / "sitecustomize.py").write_text("import coverage\ncoverage.process_startup()\n")
        environment.update(PYTHONPATH=str(hook), COVERAGE_PROCESS_START=str(settings))
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, str(pathlib.Path(__file__).resolve()), "--job", str(path)],
                                   cwd=tree, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                   env=environment, start_new_session=True)
        try:
            status = process.wait(time_limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = json.loads(outcome.read_text()) if outcome.exists() else {"seconds": {}, "failed": []}
    return Run(status, log.read_text(errors="replace"), **found)


# ---------------------------------------------------------------------------------------
# Which tests run which lines

def hash_of(*names):
    return hashlib.sha256(b"\0".join((ROOT / name).read_bytes() for name in names)).hexdigest()[:16]


def copy_tree(target):
    shutil.copytree(ROOT, target, ignore=NOT_COPIED, symlinks=True)
    return target


def make_map(folder, skips_timing):
    """The lines that each test runs, its seconds, and the tests that fail without any change."""
    cached = CACHE / f"map-{hash_of(MODULE, TESTS)}.json"
    if cached.exists():
        return json.loads(cached.read_text())
    tree = copy_tree(folder / "original")
    timed = None
    if not skips_timing:
        print("The suite runs to time its tests ...", flush=True)
        timed = run_tests(tree)
        print("   ", timed.output.strip().rpartition("\n")[2])
    print("The suite runs to record the lines of each test ...", flush=True)
    recorded = run_tests(tree, coverage=str(folder / "coverage"))
    print("   ", recorded.output.strip().rpartition("\n")[2])
    if not recorded.seconds:
        sys.exit(recorded.output + "\nNo test ran.")
    timed = timed or Run(0, "", recorded.seconds, [])

    import coverage
    tests = list(recorded.seconds)
    numbers = {test: number for number, test in enumerate(tests)}
    lines = collections.defaultdict(set)
    for path in folder.glob("coverage.*"):
        data = coverage.CoverageData(str(path))
        with contextlib.suppress(coverage.exceptions.CoverageException):    # of a process that was killed as it wrote
            data.read()
            for line, contexts in data.contexts_by_lineno(str(tree / MODULE)).items():
                lines[line] |= {numbers[context] for context in contexts if context in numbers}
    found = {"tests": tests, "seconds": [timed.seconds.get(test, recorded.seconds[test]) for test in tests],
             "lines": {line: sorted(of_line) for line, of_line in sorted(lines.items())}, "failed": timed.failed}
    if timed.failed:
        print("These tests fail without any change, and are left out:", *timed.failed, sep="\n    ")
    CACHE.mkdir(parents=True, exist_ok=True)
    cached.write_text(json.dumps(found))
    shutil.rmtree(tree)
    return found


class Suite:
    """The tests, and those of them that are to notice a mutant."""

    def __init__(self, found):
        self.names, self.seconds = found["tests"], found["seconds"]
        self.limits = dict(zip(self.names, self.seconds))
        self.lines = {int(line): tests for line, tests in found["lines"].items()}
        self.failed = set(found["failed"])
        self.breadth = collections.Counter(itertools.chain.from_iterable(self.lines.values()))

    def tests_for(self, mutant):
        """Two lists: the tests that are short and run few lines first, and all others that run the mutant's lines."""
        tests = set().union(*(self.lines.get(line, ()) for line in mutant.lines))
        tests = sorted((test for test in tests if self.names[test] not in self.failed),
                       key=lambda test: (self.seconds[test] + 0.02) * self.breadth[test])
        first, others = tests[:FIRST_TESTS], sorted(tests[FIRST_TESTS:])
        return [[self.names[test] for test in part] for part in (first, others) if part]


# ---------------------------------------------------------------------------------------
# Trying a mutant

def try_mutant(mutant, source, suite, folder, template):
    """The result of one mutant: its outcome, and the test that noticed it."""
    began = time.monotonic()
    changed = source[:mutant.begin] + mutant.text.encode() + source[mutant.end:]
    outcome, noticed_by = "survived", None
    parts = suite.tests_for(mutant)
    try:
        compile(changed, MODULE, "exec")
    except SyntaxError:
        outcome, parts = "invalid", []
    if not parts and outcome == "survived":
        noticed_by = "(no test runs it)"
    tree = pathlib.Path(tempfile.mkdtemp(dir=folder)) / "tree"
    shutil.copytree(template, tree, symlinks=True)
    (tree / MODULE).write_bytes(changed)
    for tests in parts:
        limit = 2 * TEST_PATIENCE + 10 * sum(suite.limits[test] for test in tests)
        run = run_tests(tree, tests, suite.limits, ["-x"], limit)
        if run.status == 0:
            continue
        outcome = "noticed"
        if run.status is None or "Timeout (" in run.output:
            noticed_by = "(it hangs)"
        elif run.status == 1 and run.failed:
            noticed_by = run.failed[0]
        elif run.status == 5:
            outcome, noticed_by = "survived", "(its tests were not found)"
        else:
            noticed_by = "(no test can run)"
        break
    shutil.rmtree(tree.parent, ignore_errors=True)
    return {"id": mutant.id, "section": mutant.section, "key": mutant.key, "outcome": outcome, "by": noticed_by,
            "tests": sum(map(len, parts)), "seconds": round(time.monotonic() - began, 1)}


def read_equivalents():
    """By key, the reasons why a mutant does the same as the module."""
    reasons, place, old, new = {}, None, None, None
    for line in EQUIVALENTS.read_text("utf-8").splitlines() if EQUIVALENTS.exists() else ():
        if line.startswith("["):
            place = line[1:-1]
        elif line.startswith("- "):
            old, new = line[2:], None
        elif line.startswith("+ "):
            new = line[2:]
        elif line.startswith("  ") and new is not None:
            key = (place, old, new)
            reasons[key] = " ".join(filter(None, [reasons.get(key), line.strip()]))
    return reasons


class Results:
    """The results so far, also in a file of JSON lines if there is one; its first line tells what they are of."""

    def __init__(self, path, arguments):
        self.path = path
        self.found = {}
        self.head = {"module": hash_of(MODULE), "tests": hash_of(TESTS), "seed": arguments.seed}
        if path and path.exists():
            head, *lines = path.read_text().splitlines()
            head = json.loads(head)
            if head["module"] != self.head["module"] or arguments.seed not in (None, head["seed"]):
                sys.exit(f"{path} has the results of another module, or of another seed.")
            self.head["seed"] = head["seed"]
            self.found = {result["id"]: result for result in map(json.loads, lines)}
        elif path:
            self.head["seed"] = arguments.seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
            path.write_text(json.dumps(self.head) + "\n")
        if self.head["seed"] is None:
            self.head["seed"] = random.randrange(10**6)

    def add(self, result):
        self.found[result["id"]] = result
        if self.path:
            with self.path.open("a") as output:
                output.write(json.dumps(result) + "\n")


def show_table(mutants, results, equivalents, titles):
    """The table by section, the equivalent mutants and the survivors; the share of those that were noticed."""
    columns = ("mutants", "noticed", "equivalent", "survived")
    counts = collections.defaultdict(collections.Counter)
    survivors, equal = [], []
    for mutant in mutants:
        result = results.found.get(mutant.id)
        outcome = "equivalent" if mutant.key in equivalents else result["outcome"] if result else None
        if outcome in columns:
            counts[mutant.section].update(["mutants", outcome])
            counts["all"].update(["mutants", outcome])
            if outcome != "noticed":
                (survivors if outcome == "survived" else equal).append(mutant)
    print("\n" + f"{'section':<28}" + "".join(f"{column:>12}" for column in columns))
    for section, count in counts.items():
        if section != "all":
            print(f"§{section:<3}{titles[section][1]:<24}" + "".join(f"{count[column]:>12}" for column in columns))
    print(f"{'all':<28}" + "".join(f"{counts['all'][column]:>12}" for column in columns))
    if equal:
        print("\nEquivalent:\n")
        for mutant in equal:
            print(f"{mutant}\n  {equivalents[mutant.key]}\n")
    if survivors:
        print("\nSurvivors:\n")
        for mutant in survivors:
            note = results.found[mutant.id]["by"]
            print(f"{mutant}" + (f"\n# {note}" if note else "") + "\n")
    counted = counts["all"]["noticed"] + counts["all"]["survived"]
    share = counts["all"]["noticed"] / counted if counted else 1.0
    print(f"{counts['all']['noticed']} of {counted} are noticed: {share:.1%}")
    return share


# ---------------------------------------------------------------------------------------
# The command

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = functools.partial(parser.add_argument)
    add("--count", type=int, default=300, help="mutants (default: 300)")
    add("--seed", type=int, help="of the random choice (default: a random one, which is printed)")
    add("--section", action="append", default=[], metavar="NUMBER", help="only this section; may be repeated")
    add("--locks", action="store_true", help="also take away each lock, one by one")
    add("--only-locks", action="store_true", help="nothing else")
    add("--mutant", action="append", default=[], metavar="ID", help="only this one, or all of a line; may be repeated")
    add("--again", type=pathlib.Path, metavar="FILE", help="only the survivors of these results")
    add("--list", action="store_true", help="list all possible mutants, or those named, and run nothing")
    add("--output", type=pathlib.Path, metavar="FILE", help="keep the results as JSON lines, or go on with them")
    add("--jobs", type=int, default=2, choices=(1, 2), help="mutants that are tried at a time (default: 2)")
    add("--baseline-skip", action="store_true", help="do not time the suite first; all its tests must pass")
    add("--job", type=pathlib.Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def use_environment():
    """Go on in an environment that has pytest and coverage."""
    if all(importlib.util.find_spec(name) for name in ("pytest", "coverage")):
        return
    folder = CACHE / f"environment-{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    if not python.exists():
        print("An environment with pytest and coverage is made ...", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "pytest", "coverage"], check=True)
    os.execv(python, [str(python), *sys.argv])


def main():
    arguments = parse_arguments()
    if arguments.job:
        run_job(arguments.job)
    source = (ROOT / MODULE).read_bytes()
    finder = Finder(source)
    everything = sorted(finder.mutants.values(), key=lambda mutant: mutant.begin)
    everything = [mutant for mutant in everything if not arguments.section or mutant.section in arguments.section]
    locks = [mutant for mutant in everything if mutant.kind == "lock"]
    named = [mutant for mutant in everything for name in arguments.mutant if name in (mutant.id, str(mutant.line))]
    if arguments.mutant and not named:
        sys.exit("There is no such mutant; --list lists all.")
    if arguments.list:
        for mutant in named or (locks if arguments.only_locks else everything):
            print(mutant, end="\n\n")
        return
    use_environment()
    equivalents = read_equivalents()
    results = Results(arguments.output, arguments)
    firsts = [first for first, _ in finder.titles.values()] + [source.count(b"\n")]
    lengths = {number: last - first for number, first, last in zip(finder.titles, firsts, firsts[1:])}
    if named:
        chosen, equivalents = named, {}
    elif arguments.again:
        survivors = [json.loads(line) for line in arguments.again.read_text().splitlines()[1:]]
        keys = {tuple(result["key"]) for result in survivors if result["outcome"] == "survived"}
        chosen = [mutant for mutant in everything if mutant.key in keys]
        print(f"{len(keys)} survivors, of which {len({mutant.key for mutant in chosen})} are found in the module.")
    else:
        print(f"--seed {results.head['seed']}")
        others = [mutant for mutant in everything if mutant.kind != "lock"]
        randomness = random.Random(results.head["seed"])
        chosen = [] if arguments.only_locks else choose(others, arguments.count, randomness, lengths)
        chosen += locks if arguments.locks or arguments.only_locks else []
    chosen.sort(key=lambda mutant: mutant.begin)
    with tempfile.TemporaryDirectory(prefix="mutate-") as name, \
            concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        folder = pathlib.Path(name)
        suite = Suite(make_map(folder, arguments.baseline_skip))
        template = copy_tree(folder / "template")
        run_tests(template, suite.names[:1])            # so that the copies need not compile the tests
        to_try = [mutant for mutant in chosen if mutant.key not in equivalents and mutant.id not in results.found]
        random.Random(0).shuffle(to_try)                # an early look at the results sees all sections
        tasks = [pool.submit(try_mutant, mutant, source, suite, folder, template) for mutant in to_try]
        try:
            for number, task in enumerate(concurrent.futures.as_completed(tasks), 1):
                result = task.result()
                results.add(result)
                print(f"{number:>4}/{len(tasks)}  {result['outcome']:<9} §{result['section']:<3}{result['id']:<20}"
                      f"{result['seconds']:>6} s  {(result['by'] or '').rpartition('::')[2]}", flush=True)
        except KeyboardInterrupt:
            for task in tasks:
                task.cancel()
            print("Interrupted; these are the results so far.")
        share = show_table(chosen, results, equivalents, finder.titles)
    sys.exit(share < LEAST_NOTICED)


if __name__ == "__main__":
    main()
