"""Which key each route wants, declared by the route itself: one that declares nothing is refused at the start.

Knows scopes and route tables. Whether a key is one at all, ``auth/key_check.py`` has told before.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fastapi import APIRouter, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from sightline_server.auth.principal import Scope
from sightline_server.errors import Forbidden
from sightline_server.routes.context import principal_of


@dataclass(frozen=True)
class Needs:
    """A dependency: 403 unless the caller's key has the scope. None: any key will do."""

    scope: Scope | None

    async def __call__(self, request: Request) -> None:
        if self.scope is not None and self.scope not in principal_of(request).scopes:
            raise Forbidden(f"This key lacks the scope '{self.scope}'. Use a key that has it.")


@dataclass(frozen=True)
class Open:
    """A dependency that asks for nothing: the route needs no key."""

    async def __call__(self) -> None: ...


OPEN = Open()
ANY_KEY = Needs(None)


def include(app: FastAPI, routers: Iterable[APIRouter]) -> frozenset[str]:
    """Give ``app`` its routes: all there are. Returns the paths that need no key.

    Raises AssertionError for a route that doesn't declare exactly one access.
    """
    assert not app.routes, f"routes that declare no access: {app.routes}"
    open_paths = set()
    for router in routers:
        for route in router.routes:
            if access_of(route) == OPEN:
                assert isinstance(route, APIRoute)
                open_paths.add(route.path)
        app.include_router(router)
    return frozenset(open_paths)


def access_of(route: BaseRoute) -> Needs | Open:
    """What the route declares. Raises AssertionError when that isn't exactly one access."""
    dependencies = [one.dependency for one in route.dependencies] if isinstance(route, APIRoute) else []
    declared = [one for one in dependencies if isinstance(one, Needs | Open)]
    path = getattr(route, "path", repr(route))
    assert len(declared) == 1, f"route {path} declares {len(declared)} accesses: give it Depends(Needs(...)) once"
    return declared[0]
