"""The environment: Jinja with a syntax tree that goes through this package at every step."""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gemma_hub.errors import nearest
from gemma_hub.tokenizers.chat_template.budget import (
    Stopped,
    current_budget,
    kind_of,
    spend,
    text_of,
)
from gemma_hub.tokenizers.chat_template.filters import (
    known_filters,
    known_tests,
)
from gemma_hub.tokenizers.chat_template.limits import (
    CALL,
    MAX_BITS,
    MAX_DEPTH,
    MAX_LENGTH,
    MAX_TOKENS,
    PLACE,
)
from gemma_hub.tokenizers.chat_template.operations import (
    NOTHING,
    OPERATORS,
    Function,
    attribute_of,
    bounded_range,
    made_dict,
    operated,
    raise_exception,
    strftime_now,
    whole,
)

if TYPE_CHECKING:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

_NODES = frozenset(
    "Template Output TemplateData For If Macro CallBlock FilterBlock With Assign AssignBlock "
    "Continue Break Scope Name NSRef Const Tuple List Dict Pair Keyword CondExpr Filter Test Call "
    "Getitem Getattr Slice Concat Compare Operand And Or Not Neg Pos Add Sub Mul Div FloorDiv Mod "
    "Pow".split()
)


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> "jinja2.Template":
    if len(template) > MAX_LENGTH:
        raise Stopped(f"has {len(template):,} characters, more than {MAX_LENGTH:,}")
    # Jinja takes 300 bytes for each digit of a number.
    if any(word.end() - word.start() > 10_000 for word in re.finditer(r"\w+", template)):
        raise Stopped("has a word of more than 10,000 characters")
    return template_environment().from_string(template)


@functools.cache
def template_environment() -> "ImmutableSandboxedEnvironment":
    from jinja2 import TemplateSyntaxError, Undefined, nodes, pass_context
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.runtime import Context, Macro
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace as JinjaNamespace
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """`{% generation %}`, by which training finds the model's turns: its content."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

        def filter_stream(self, stream: Any) -> Iterator[Any]:
            for count, token in enumerate(stream):
                if count > MAX_TOKENS:
                    raise Stopped(f"has more than {MAX_TOKENS:,} words of Jinja")
                yield token

    class Rewriter(NodeTransformer):
        """Sends whatever costs something through the functions above."""

        def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
            if (name := type(node).__name__) not in _NODES:
                raise TemplateSyntaxError(f"it uses {name}, which is refused", node.lineno)
            return super().generic_visit(node)

        def visit_For(self, node: nodes.For) -> nodes.Node:
            if node.recursive:
                raise TemplateSyntaxError("a recursive loop is refused", node.lineno)
            self.generic_visit(node)
            node.iter = self._through("(each)", node.iter)
            return node

        def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
            return self._called(node, "filter", filters)

        def visit_Test(self, node: nodes.Test) -> nodes.Node:
            return self._called(node, "test", tests)

        def visit_Call(self, node: nodes.Call) -> nodes.Node:
            return self._called(node)

        def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
            return nodes.Const(node.data, lineno=node.lineno)  # goes through `finalize`

        def visit_Const(self, node: nodes.Const) -> nodes.Node:
            large = isinstance(node.value, int) and node.value.bit_length() > MAX_BITS
            if large or node.value == float("inf"):
                raise TemplateSyntaxError("a number is too large", node.lineno)
            return node

        def visit_NSRef(self, node: nodes.NSRef) -> nodes.Node:
            if node.attr.startswith("_"):
                raise TemplateSyntaxError("a name with an underscore is refused", node.lineno)
            return node

        def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
            self.generic_visit(node)
            node.expr = self._through("(compared)", node.expr)
            for operand in node.ops:
                operand.expr = self._through("(compared)", operand.expr)
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            return self._through("(concatenated)", *node.nodes)

        def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
            self.generic_visit(node)
            if not isinstance(node.arg, nodes.Slice):
                return node
            ends = (node.arg.start, node.arg.stop, node.arg.step)
            return self._through("(sliced)", node.node, *(end or nodes.Const(None) for end in ends))

        def visit_List(self, node: nodes.List) -> nodes.Node:
            return self._through("(made)", self.generic_visit(node))

        def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
            self.generic_visit(node)
            return node if node.ctx == "store" else self._through("(made)", node)

        visit_Dict = visit_List

        def _called(
            self, node: Any, kind: str = "", known: Mapping[str, Any] | None = None
        ) -> nodes.Node:
            if known is not None and node.name not in known:
                hint = nearest(node.name[:100], (name for name in known if name[0].isalpha()))
                said = f"there is no {kind} {node.name[:100]!r} here. {hint}"
                raise TemplateSyntaxError(said.strip(), node.lineno)
            if node.dyn_args is not None or node.dyn_kwargs is not None:
                raise TemplateSyntaxError("arguments with a star are refused", node.lineno)
            return self.generic_visit(node)

        def _through(self, name: str, value: Any, *args: Any) -> nodes.Expr:
            return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)

    class Namespace(JinjaNamespace):
        """`namespace(...)`: the one thing that a template may change."""

        def __init__(self, /, *args: Any, **kwargs: Any) -> None:
            names = dict(*args, **kwargs)
            if any(not isinstance(name, str) or name.startswith("_") for name in names):
                raise Stopped("gives a namespace a name with an underscore")
            spend(CALL)
            super().__init__(names)

        def __repr__(self) -> str:
            return "<Namespace>"

    class Environment(ImmutableSandboxedEnvironment):
        concat = staticmethod(whole)
        intercepted_binops = frozenset(OPERATORS)

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree = super()._parse(source, name, filename)
            return Rewriter().visit(tree)  # type: ignore[no-any-return]

        def getattr(self, obj: Any, attribute: str) -> Any:
            spend()
            if isinstance(obj, Undefined):
                return obj[attribute]  # raises
            found = attribute_of(obj, attribute)
            return self._item(obj, attribute) if found is NOTHING else found

        def getitem(self, obj: Any, argument: Any) -> Any:
            spend()
            if isinstance(obj, Undefined):
                return obj[argument]  # raises
            return self._item(obj, argument)

        def _item(self, obj: Any, key: Any) -> Any:
            if isinstance(obj, (str, list, tuple, dict, range)):
                try:
                    return obj[key]
                except (TypeError, LookupError):
                    pass
            found = attribute_of(obj, key) if isinstance(key, str) else NOTHING
            if found is not NOTHING:
                return found
            return self.undefined(obj=obj, name=key[:100] if isinstance(key, str) else kind_of(key))

        def call_binop(self, context: Context, sign: str, left: Any, right: Any) -> Any:
            return operated(sign, left, right)

        def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            for name in ("_loop_vars", "_block_vars"):  # from Jinja, for functions that ask for it
                kwargs.pop(name, None)
            budget = current_budget.get()
            budget.weight(*args, *kwargs.values())
            if not isinstance(obj, Macro):
                if not isinstance(obj, (Function, Undefined)):
                    raise TypeError(f"a {kind_of(obj)} cannot be called")
                return super().call(context, obj, *args, **kwargs)
            budget.spend(CALL)
            budget.macros += 1
            if budget.macros > MAX_DEPTH:
                raise Stopped(f"calls macros in macros more than {MAX_DEPTH} deep")
            try:
                return super().call(context, obj, *args, **kwargs)
            finally:
                budget.macros -= 1

    @pass_context
    def finalize(context: Context, value: Any) -> str:  # a context keeps it from compile time
        text = str(text_of(value))
        spend(len(text) + PLACE)
        return text

    filters, tests = known_filters(), known_tests()
    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        extensions=[Generation, LoopControlExtension],
        finalize=finalize,
    )
    environment.filters = filters
    environment.tests = tests  # type: ignore[assignment]
    environment.globals = {
        "range": Function(bounded_range),
        "dict": Function(made_dict),
        "namespace": Function(Namespace),
        "raise_exception": Function(raise_exception),
        "strftime_now": Function(strftime_now),
    }
    return environment
