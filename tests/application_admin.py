"""An application on starlette-admin, which is imported late: not every environment has it."""

from inspect import signature
from typing import Any

from beanie import Document
from starlette.applications import Starlette

from beanie_session_scope import SessionScopeMixin, on_commit, outside_session
from beanie_session_scope.asgi import SessionScopeMiddleware


class Ticket(SessionScopeMixin, Document):
    title: str
    paid: bool = False

    class Settings:
        name = "application_ticket"


class Entry(SessionScopeMixin, Document):
    """What was done, by the hooks of the admin."""

    text: str

    class Settings:
        name = "application_entry"


MODELS: list[Any] = [Ticket, Entry]
COLLECTIONS = ("application_ticket", "application_entry")


def create_app(
    told: list[str], client: Any = None, *, count_outside: bool = False, **options: Any
) -> Starlette:
    """Create the application; with a client, its requests run in a scope.

    Args:
        told: What was told to others after a commit.
        client: The driver's.
        count_outside: Let the list of tickets count them outside the scope.
        options: Of the middleware.
    """
    from starlette_admin.contrib.beanie import Admin, ModelView
    from starlette_admin.exceptions import ActionFailed

    class TicketView(ModelView):  # type: ignore[type-arg,unused-ignore]
        fields = ["id", "title", "paid"]

        async def after_create(self, request: Any, obj: Any) -> None:
            await Entry(text=f"created {obj.title}").insert()
            on_commit(lambda: told.append(obj.title))
            if obj.title == "Emma":
                raise RuntimeError("the catalogue does not answer")

        async def before_delete(self, request: Any, obj: Any) -> None:
            if obj.paid:
                raise ActionFailed("A paid ticket can't be deleted.")

        async def after_delete(self, request: Any, obj: Any) -> None:
            await Entry(text=f"deleted {obj.title}").insert()

    class CountedOutside(TicketView):
        async def count(self, *arguments: Any, **more: Any) -> int:
            with outside_session(Ticket):
                return int(await super().count(*arguments, **more))

    app = Starlette()
    if client is not None:
        app.add_middleware(SessionScopeMiddleware, client=client, collections=MODELS, **options)
    # Releases from 1.0 on sign their cookies.
    signing = "secret_key" in signature(Admin).parameters
    admin = Admin(**{"secret_key": "of the tests"} if signing else {})
    admin.add_view((CountedOutside if count_outside else TicketView)(Ticket))
    admin.mount_to(app)
    return app
