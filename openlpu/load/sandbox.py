"""In: the source of a chat template by a stranger. Out: a jinja2 environment that runs it metered.

jinja2's own sandbox stops attribute walks. It does not stop 'x' * 10**10, a list doubled in a loop,
or a format width of a billion. So the syntax tree is rewritten to report loops, literals, ~ and
comparisons to the meter, operators and calls are intercepted, and only the filters, tests and
methods listed here exist, each priced before it runs.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import types
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, cast

import jinja2.ext
from jinja2 import nodes
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace, pass_context
from jinja2.visitor import NodeTransformer

from openlpu.errors import TemplateError
from openlpu.load.fields import one_line
from openlpu.load.meter import ENTRY_BYTES, MAX_INT_BITS, STEP_BYTES, Meter, check_width

FILTERS: Final = frozenset(
    """abs attr batch capitalize center count d default dictsort e escape filesizeformat first float
    forceescape format groupby indent int items last length list lower map max min reject rejectattr
    replace reverse round safe select selectattr slice sort string title trim truncate unique upper
    urlencode wordcount""".split()  # noqa: SIM905 (a list of fifty quoted names is no clearer)
)
METHODS: Final[dict[type, frozenset[str]]] = {
    str: frozenset(
        """capitalize casefold center count endswith expandtabs find format format_map index isalnum
        isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle
        isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex
        rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
        zfill""".split()  # noqa: SIM905
    ),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    LoopContext: frozenset({"changed", "cycle"}),
    Cycler: frozenset({"next", "reset"}),
}
_CALLABLES = (Macro, LoopContext, Joiner, Undefined)
# What takes a width or a count; what turns its value into text; what cuts a text to pieces, which
# are objects of fifty bytes; what compares its arguments or
# prints them in its errors; what compares the entries of a list with each other.
_WIDE = frozenset(
    """batch center expandtabs indent ljust rjust round slice truncate zfill""".split()  # noqa: SIM905
)
_TEXTUAL = frozenset(
    """capitalize center e escape forceescape format indent lower replace safe string title trim
    truncate upper urlencode wordcount""".split()  # noqa: SIM905
)
_CUTTING = frozenset({"list", "rsplit", "split", "splitlines", "title", "wordcount"})
_QUOTING = frozenset(
    """attr changed count get index map reject rejectattr select selectattr""".split()  # noqa: SIM905
)
_COMPARING = frozenset({"groupby", "max", "min", "sort", "unique"})
# Names of the hooks that the rewritten tree calls. No template can spell them: they hold a space.
_TICK, _BUILT, _COMPARED, _JOINED, _SLICED = "a tick", "a built", "a compared", "a joined", "a cut"
_REFUSED = (
    nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport,
    nodes.EvalContextModifier, nodes.ScopedEvalContextModifier,
)  # fmt: skip


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """jinja2 as chat templates expect it, every operation of which is charged to `meter`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, meter: Meter, clock: Callable[[], datetime]) -> None:
        """`meter` pays for compiling; replace it before each rendering."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            # No folding of constants: that would run operators and filters unmetered.
            optimized=False,
            finalize=pass_context(lambda _, value: self._print(value)),
            extensions=[jinja2.ext.loopcontrols, _Generation],
        )
        self.meter = meter
        originals: dict[str, Callable[..., Any]] = {
            **{name: self.filters[name] for name in FILTERS},
            "join": self._join,
            "sum": self._sum,
            "tojson": self._tojson,
        }
        tests = cast(dict[str, Callable[..., Any]], self.tests)
        self.filters = {name: self._metered(name, f) for name, f in originals.items()}
        self.filters |= {
            _TICK: self._tick,
            _BUILT: self._built,
            _COMPARED: self._compared,
            _JOINED: self._joined,
            _SLICED: lambda value: self.meter.charge_result(value),
        }
        self.tests = {name: self._metered_test(name, test) for name, test in tests.items()}
        self.globals = {
            "range": self.globals["range"],
            "cycler": Cycler,
            "joiner": Joiner,
            "dict": dict,
            "namespace": _PlainNamespace,
            "raise_exception": self._raise_exception,
            "strftime_now": lambda form: _strftime(clock(), form),
        }
        self._free_calls = frozenset(map(id, self.globals.values()))

    def load_source(self, source: str) -> jinja2.Template:
        """Parse, rewrite and compile. Raises jinja2's errors and TemplateError."""
        tree: nodes.Template = _Rewrite().visit(self.parse(source))
        return self.from_string(tree)

    # What jinja2 calls while a template runs.

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Price the four operators whose result can dwarf their operands, then apply them."""
        meter = self.meter
        sequences = (str, list, tuple)
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, sequences) and isinstance(count, int):
                    meter.charge_copies(value, count)
        elif operator == "**":
            powers = isinstance(left, int) and isinstance(right, int)
            if powers and left.bit_length() * abs(right) > MAX_INT_BITS:
                raise TemplateError("the chat template makes an integer that is too large")
        elif operator == "%" and isinstance(left, str):
            meter.charge_format(left, right)
        elif operator == "+" and isinstance(left, sequences) and isinstance(right, sequences):
            meter.charge_copies(left, 1)
            meter.charge_copies(right, 1)
        result = self.binop_table[operator](left, right)
        if isinstance(result, tuple):
            # Tuples can be hashed, which walks them whole.
            meter.charge_structure(result)
        return meter.charge_result(result)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a global, a macro, or a listed method of a plain value; nothing else."""
        method = getattr(obj, "__wrapped__", obj)
        if id(obj) in self._free_calls:
            # They hash, compare or print what they are given.
            self.meter.charge_structure([args, kwargs])
        elif isinstance(method, (types.BuiltinMethodType, types.MethodType)):
            owner, name = method.__self__, method.__name__
            if not any(isinstance(owner, kind) and name in METHODS[kind] for kind in METHODS):
                raise TemplateError(f"the chat template calls {name}(), which is not allowed")
            if name == "join" and len(args) == 1:
                args = (self.meter.drain(args[0]),)
                self._price_join(args[0], owner)
            given = {key: value for key, value in kwargs.items() if not key.startswith("_")}
            self._price(name, owner, args, given)
        elif isinstance(obj, _CALLABLES):
            self.meter.charge(4 * STEP_BYTES)
        else:
            raise TemplateError("the chat template calls something that is not a function")
        result = super().call(context, obj, *args, **kwargs)
        if obj is dict:
            self.meter.charge_structure(result)
        return self.meter.charge_result(result)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Subscribe a value; a missing key is printed in an error, so it is priced as text."""
        if isinstance(argument, tuple):
            self.meter.charge_text(argument)
        return super().getitem(obj, argument)

    # Prices of filters and methods.

    def _price(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Charge, before the call, what the result of a filter or method may cost."""
        meter = self.meter
        given = (*args, *kwargs.values())
        size = len(value) if isinstance(value, (str, list, tuple, dict, range)) else 1
        meter.charge(STEP_BYTES + (size * ENTRY_BYTES if name in _CUTTING else size >> 4))
        if name in _WIDE:
            check_width(*given)
        if name in ("format", "format_map"):
            meter.charge_format(str(value), [args, kwargs])
        elif name == "replace":
            old = args[0] if args else kwargs.get("old")
            new = args[1] if len(args) > 1 else kwargs.get("new")
            meter.charge_text([old, new])
            meter.charge_copies(str(new), str(value).count(str(old)))
        elif name == "expandtabs":
            meter.charge(size * (max(map(int, given), default=8) + 1))
        elif name == "indent":
            steps = [len(step) if isinstance(step, str) else int(step) for step in given]
            check_width(*steps)
            meter.charge((str(value).count("\n") + 1) * max(steps, default=4))
        elif name in _QUOTING:
            meter.charge_structure(value)
            meter.charge_text(given)

    def _metered(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter so that its inputs and its result are charged."""
        leading = 1 if hasattr(run, "jinja_pass_arg") else 0
        signature = inspect.signature(run)

        @functools.wraps(run)
        def metered(*args: Any, **kwargs: Any) -> Any:
            before, value, rest = args[:leading], args[leading], args[leading + 1 :]
            if name in _TEXTUAL:
                self.meter.charge_text(value)
            elif name in _COMPARING:
                value = self.meter.drain(value)
                arguments = signature.bind(*before, value, *rest, **kwargs).arguments
                key = make_attrgetter(self, arguments.get("attribute"))
                self.meter.charge_structure([key(entry) for entry in value], times=4)
            elif name == "dictsort":
                self.meter.charge_structure(value, times=4)
            self._price(name, value, rest, kwargs)
            result = run(*before, value, *rest, **kwargs)
            if isinstance(result, types.GeneratorType):
                # An iterator again, not a list: templates see that it is true even when empty.
                return iter(self.meter.drain(result))
            return self.meter.charge_result(result)

        return metered

    def _metered_test(self, name: str, test: Callable[..., Any]) -> Callable[..., Any]:
        leading = 1 if hasattr(test, "jinja_pass_arg") else 0

        @functools.wraps(test)
        def metered(*args: Any) -> Any:
            self.meter.charge(STEP_BYTES)
            for value in args[leading:]:
                if name in ("lower", "upper"):
                    self.meter.charge_text(value)
                self.meter.charge_structure(value)
            return test(*args)

        return metered

    def _price_join(self, entries: list[Any], separator: Any) -> None:
        self.meter.charge_text(entries)
        self.meter.charge(self.meter.charge_text(separator) * len(entries))

    # Hooks that the rewritten tree calls, and filters that are easier to write than to price.

    def _print(self, value: Any) -> str:
        self.meter.charge_text(value)
        return str(value)

    def _raise_exception(self, message: Any = "") -> None:
        self.meter.charge_text(message)
        raise TemplateError(f"the chat template refuses this conversation: {one_line(message)}")

    def _tick(self, cost_bytes: int) -> bool:
        self.meter.charge(cost_bytes)
        return True

    def _built(self, value: Any) -> Any:
        self.meter.charge(STEP_BYTES)
        self.meter.charge_structure(value)
        return value

    def _compared(self, value: Any) -> Any:
        self.meter.charge_structure(value)
        return value

    def _joined(self, parts: tuple[Any, ...]) -> Any:
        return self.meter.charge_result("".join([self._print(part) for part in parts]))

    def _join(self, value: Any, d: Any = "", attribute: Any = None) -> str:
        entries = self.meter.drain(value)
        if attribute is not None:
            entries = list(map(make_attrgetter(self, attribute), entries))
        self._price_join(entries, d)
        return str(d).join(map(str, entries))

    def _sum(self, value: Any, attribute: Any = None, start: Any = 0) -> Any:
        entries = self.meter.drain(value)
        key = make_attrgetter(self, attribute)
        return functools.reduce(
            lambda total, entry: self.call_binop(None, "+", total, key(entry)), entries, start
        )

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers defines it: plain JSON, nothing escaped for HTML."""
        step = len(indent) if isinstance(indent, str) else indent or 0
        check_width(step)
        if any(len(part) > ENTRY_BYTES for part in separators or ()):
            raise TemplateError("the chat template uses a JSON separator that is too long")
        self.meter.charge_text(value, indent=step)
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )


class _Rewrite(NodeTransformer):
    """Inserts the hooks; refuses the tags that load other templates."""

    def generic_visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(node, _REFUSED):
            tag = type(node).__name__.lower()
            raise TemplateError(f"the chat template uses the {tag} tag, which is not allowed")
        return super().generic_visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (named by jinja2)
        # Each turn pays for all the text and the statements in its body, whether they run or not.
        cost_bytes = STEP_BYTES + sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        cost_bytes += sum(4 for _ in node.find_all(nodes.Stmt))
        self.generic_visit(node)
        tick = _hook(_TICK, nodes.Const(cost_bytes), node)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        if node.test is not None:
            step = _hook(_TICK, nodes.Const(STEP_BYTES), node)
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _hook(_COMPARED, node.expr, node)
        for operand in node.ops:
            operand.expr = _hook(_COMPARED, operand.expr, node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _hook(_JOINED, nodes.Tuple(node.nodes, "load", lineno=node.lineno), node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _hook(_SLICED, node, node) if isinstance(node.arg, nodes.Slice) else node

    def _literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"
        return node if stored else _hook(_BUILT, node, node)

    visit_List = visit_Dict = visit_Tuple = _literal  # noqa: N815


class _Generation(jinja2.ext.Extension):
    """{% generation %}: marks the assistant's text for training; here its body is just printed."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _PlainNamespace(Namespace):
    """namespace(): no underscored names, and a text form that shows nothing of what it holds."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No named self: namespace(self=1) is legal.
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_attribute(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise TemplateError("the chat template sets a namespace attribute that starts with _")


def _hook(name: str, value: nodes.Expr, at: nodes.Node) -> nodes.Filter:
    hook = nodes.Filter(value, name, [], [], None, None, lineno=at.lineno)
    value.lineno = at.lineno
    return hook


def _strftime(now: datetime, form: str) -> str:
    if len(form) > 256 or re.search(r"%[^A-Za-z%]*\d", form):
        raise TemplateError("the chat template asks for a date format that is not allowed")
    return now.strftime(form)
