"""The list/watch protocol for one kind of object, as a state machine without I/O or clock. Pure.

It implements the Kubernetes API concepts "Efficient detection of changes", "Streaming lists" (WatchList, KEP-3157),
"Retrieving large results sets in chunks" and "410 Gone responses".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from msgspec import Struct

from kproxy.kube.codec.conversion import HEADLESS_LABEL, PROXY_NAME_LABEL, DecodedObject, ignored_fields_text
from kproxy.kube.codec.json_codec import ListPageError, read_error, read_page
from kproxy.kube.codec.streams import ACCEPT_JSON, ACCEPT_WATCH
from kproxy.kube.codec.watch_events import Bookmark, Deleted, ErrorStatus, Event, UndecodableObject
from kproxy.model.delta import Delete, Delta, Kind, Replace, Upsert
from kproxy.model.packed_objects import PackedSequence, pack
from kproxy.model.types import EndpointSlice, Service, ServiceCIDR

PAGE_SIZE = 500
"""Objects per page of a list, client-go's default."""
INACTIVITY = 90.0
"""Seconds without data after which a connection counts as dead. Bookmarks arrive about every 60 s."""
BOOKMARK_DUE = 0.8
"""Fraction of `INACTIVITY` within which a bookmark should arrive. Shorter connections can end without a bookmark."""
SHORT_IDLE_DIVISOR = 20
"""Idle seconds on such shorter connections that count as one second. They cause a relist only after an hour."""
MAX_IDLE_PERIODS = 2
"""Multiple of `INACTIVITY` without an event or bookmark, over any number of connections, after which to relist.

An API server whose etcd was restored from an older backup accepts a resourceVersion that it has not reached yet, and
sends nothing, not even bookmarks, until it has (kubernetes/kubernetes#107457). A relist is cheap, because objects that
did not change cause no work."""
MIN_WATCH_SECONDS = 1.0
"""A watch that the server closes sooner has failed, even if it was closed cleanly (client-go uses the same limit)."""
MAX_INCOMPLETE_LISTS = 2
"""Maximum number of consecutive lists to discard because they contain objects without a readable name.

The next list is used without these objects.
"""
MAX_BACKOFF = 24.0
"""Seconds between attempts after many failures (18 to 30 with jitter), as in client-go."""
MAX_UNAVAILABLE_BACKOFF = 240.0
"""The same for an optional kind that the server does not serve or does not allow reading (180 to 300 with jitter)."""

_TRANSIENT_STATUSES = frozenset({401, 429, 503, 504})
_UNAVAILABLE_STATUSES = frozenset({403, 404})
"""Statuses of a server that does not allow reading a kind (403) or does not serve it (404)."""
_NOT_OTHER_PROXY = f"!{PROXY_NAME_LABEL}"
_NOT_HEADLESS = f"{_NOT_OTHER_PROXY},!{HEADLESS_LABEL}"
_WITH_CLUSTER_IP = "spec.clusterIP!=None,spec.type!=ExternalName"


class ApiResource(Struct, frozen=True):
    """A resource of the API: its path, its name as in RBAC rules, and the selectors of lists and watches.

    `unavailable_effect` says what does not work if the server does not serve an optional resource; it is "" for a
    required one.
    """

    path: str
    name: str
    selectors: dict[str, str] = {}
    unavailable_effect: str = ""


class ListWatchRequest(Struct, frozen=True):
    """A GET request for a watch, or else for one page of a list. `accept` is the Accept header."""

    path: str
    params: dict[str, str]
    watch: bool
    accept: str = ACCEPT_JSON


class InvalidObject(Struct, frozen=True):
    """An object that is invalid or cannot be decoded. Its last valid state stays in use.

    `name` is "" if the name cannot be decoded either. `text` says what is wrong.
    """

    kind: Kind
    namespace: str
    name: str
    text: str


class IgnoredFields(Struct, frozen=True):
    """Endpoints or ports of an object that cannot be used; `text` says which and why."""

    kind: Kind
    namespace: str
    name: str
    text: str


Message: TypeAlias = Delta | InvalidObject | IgnoredFields


class ListWatchStep(Struct, frozen=True):
    """What to do next.

    `reconnect_after` is None to continue with the current response. Otherwise, close it and send the next request
    after that many seconds; `renew_credentials` asks for new credentials before that.
    """

    messages: tuple[Message, ...] = ()
    reconnect_after: float | None = None
    renew_credentials: bool = False


def resource_of(kind: Kind, node_name: str) -> ApiResource:
    """Return the resource of a kind. For Nodes, it selects only `node_name`."""
    if kind is Service:
        selectors = {"labelSelector": _NOT_OTHER_PROXY, "fieldSelector": _WITH_CLUSTER_IP}
        return ApiResource("/api/v1/services", "services", selectors)
    if kind is EndpointSlice:
        path = "/apis/discovery.k8s.io/v1/endpointslices"
        return ApiResource(path, "endpointslices.discovery.k8s.io", {"labelSelector": _NOT_HEADLESS})
    if kind is ServiceCIDR:
        # Optional: Kubernetes before 1.33 does not serve it, and older ClusterRoles do not grant it.
        path = "/apis/networking.k8s.io/v1/servicecidrs"
        effect = "packets to unallocated service addresses are not dropped"
        return ApiResource(path, "servicecidrs.networking.k8s.io", unavailable_effect=effect)
    return ApiResource("/api/v1/nodes", "nodes", {"fieldSelector": f"metadata.name={node_name}"})


class ListWatch:
    """The list/watch state machine of one kind.

    Send what `next_request` returns, report the outcome to the `handle_...` methods, and carry out the `ListWatchStep`
    that they return. `random` returns a float in [0, 1); `inactivity` is in seconds. `error` is the current problem as
    one line, or "" if there is none. `optional_statuses` are the HTTP statuses that are not errors, because kproxy
    works without the kind.
    """

    def __init__(self, kind: Kind, node_name: str, random: Callable[[], float], inactivity: float = INACTIVITY) -> None:
        self.error = ""
        self.inactivity = inactivity
        self._kind = kind
        self._random = random
        resource = resource_of(kind, node_name)
        self.resource = resource.name
        self._path, self._selectors = resource.path, dict(resource.selectors)
        self._unavailable_effect = resource.unavailable_effect
        self.optional_statuses = _UNAVAILABLE_STATUSES if resource.unavailable_effect else frozenset()
        self._unavailable_error = ""
        self._may_drop_field_selector = kind is Service
        self._use_watch_list = True
        self._watch_list_works = False
        self._accept = ACCEPT_WATCH
        self._resource_version = ""  # to watch from; "" while a list is needed
        self._continue_token = ""
        self._listed: dict[tuple[str, str], bytes | None] = {}  # packed objects; None: exists, but is invalid
        self._was_listed = False
        self._missed_change = False  # an object changed whose name cannot be decoded: only a relist recovers it
        self._incomplete_lists = 0
        self._failures = 0
        self._relists = 0
        self._active = False  # an event or bookmark arrived on the current connection
        self._idle_seconds = 0.0  # seconds without one on earlier connections

    @property
    def unavailable(self) -> bool:
        """Whether the current error is only that the server does not serve or allow an optional kind."""
        return bool(self._unavailable_error) and self.error == self._unavailable_error

    def next_request(self) -> ListWatchRequest:
        """Return the next request to send."""
        params = dict(self._selectors)
        if not self._resource_version and not self._use_watch_list:
            params["limit"] = str(PAGE_SIZE)
            if self._continue_token:
                params["continue"] = self._continue_token
            return ListWatchRequest(self._path, params, watch=False)
        params |= {"watch": "1", "allowWatchBookmarks": "true"}
        if self._resource_version:
            params["resourceVersion"] = self._resource_version
        else:
            params |= {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        params["timeoutSeconds"] = str(300 + int(301 * self._random()))
        return ListWatchRequest(self._path, params, watch=True, accept=self._accept)

    def handle_open(self) -> None:
        """Handle the start of a watch: its response has status 200."""
        self._active = False
        if self._resource_version:
            self.error = ""

    def handle_event(self, event: Event) -> ListWatchStep:
        """Handle an event of a watch."""
        if isinstance(event, UndecodableObject) and not event.name:
            self._accept = ACCEPT_JSON  # the cause may be protobuf, if the watch used it
        if isinstance(event, ErrorStatus):
            return self._handle_error_event(event)
        return self._handle_change(event) if self._resource_version else self._handle_initial_event(event)

    def handle_page(self, raw: bytes) -> ListWatchStep:
        """Handle the body of a list page."""
        try:
            page = read_page(self._kind, raw)
        except ListPageError as error:
            return self._retry(f"cannot decode a list page of {self.resource}: {error}")
        invalid = tuple(self._add_invalid(item) for item in page.items if isinstance(item, UndecodableObject))
        decoded = [item for item in page.items if isinstance(item, DecodedObject)]
        for item in decoded:
            self._add_listed(item)
        ignored = [message for item in decoded if item.ignored_fields for message in self._ignored_fields(item)]
        messages: tuple[Message, ...] = (*invalid, *ignored)
        self._continue_token = page.continue_token
        if page.continue_token:
            return ListWatchStep(messages, reconnect_after=0.0)
        return self._complete_list(page.resource_version, messages, reconnect_after=0.0)

    def handle_status(self, status: int, headers: Mapping[str, str], body: bytes) -> ListWatchStep:
        """Handle a response with a status other than 200."""
        error = read_error(status, headers, body)
        if status == 410 or (status == 400 and self._continue_token):
            return self._relist(error)
        invalid = status in {400, 422} or "sendInitialEvents" in error.message
        if status == 400 and self._may_drop_field_selector and "field" in error.message:
            return self._drop_field_selector()
        if invalid and not self._resource_version and self._use_watch_list:
            return self._fall_back_to_pages()
        if status == 400 and self._may_drop_field_selector:
            return self._drop_field_selector()
        if invalid and self._resource_version:
            return self._relist(error)
        return self._handle_error(error)

    def handle_close(self, duration: float) -> ListWatchStep:
        """Handle the end of a watch that the server closed cleanly, `duration` seconds after its start."""
        if not self._resource_version:
            return self._retry(f"cannot list {self.resource}: the watch ended before the end of the initial events")
        if duration < MIN_WATCH_SECONDS:
            return self._retry(f"cannot watch {self.resource}: the API server closes the watch immediately")
        self._failures = 0
        self._relist_if_missed()
        self._add_idle_time(duration)
        return ListWatchStep(reconnect_after=0.0)

    def handle_failure(self, text: str, duration: float = 0.0) -> ListWatchStep:
        """Handle a failure to connect, or a connection that broke `duration` seconds after the start of its watch."""
        verb = "watch" if self._resource_version else "list"
        step = self._retry(f"cannot {verb} {self.resource}: {text}")
        self._add_idle_time(duration)
        return step

    def handle_inactivity(self) -> ListWatchStep:
        """Handle a connection that received nothing for `inactivity` seconds."""
        verb = "watch" if self._resource_version else "list"
        text = f"cannot {verb} {self.resource}: no data received for {self.inactivity:g} s"
        if self._resource_version:
            self._relist_if_missed()
            self.error = text
            self._active = False  # events arrived only before the connection became idle
            self._add_idle_time(self.inactivity)
            return ListWatchStep(reconnect_after=0.0)
        if self._use_watch_list and not self._watch_list_works:  # the server may not know sendInitialEvents
            self.error = text
            return self._fall_back_to_pages()
        return self._retry(text)

    def _add_idle_time(self, seconds: float) -> None:
        """Count the idle time at the end of a connection, and relist after too much of it."""
        if not self._resource_version or self._active:
            return
        # Behind a load balancer that closes idle connections, bookmarks may never arrive.
        due = seconds >= BOOKMARK_DUE * self.inactivity
        self._idle_seconds += seconds if due else seconds / SHORT_IDLE_DIVISOR
        if self._idle_seconds >= MAX_IDLE_PERIODS * self.inactivity:
            self.error = f"must relist {self.resource}: no event or bookmark for too long"
            self._start_list()

    def _handle_initial_event(self, event: Event) -> ListWatchStep:
        """Handle an event of a watch that starts with the list (`sendInitialEvents`)."""
        if isinstance(event, Bookmark):
            if not event.initial_events_end:  # the server does not know sendInitialEvents
                return self._fall_back_to_pages()
            self._watch_list_works = True
            return self._complete_list(event.resource_version, (), reconnect_after=None)
        if isinstance(event, UndecodableObject):
            return ListWatchStep((self._add_invalid(event),))
        if isinstance(event, Deleted):
            self._listed.pop((event.namespace, event.name), None)
        elif isinstance(event, DecodedObject):
            self._add_listed(event)
            return ListWatchStep(self._ignored_fields(event))
        return ListWatchStep()

    def _handle_change(self, event: Event) -> ListWatchStep:
        """Handle an event after the list."""
        assert not isinstance(event, ErrorStatus)
        self._active, self._idle_seconds = True, 0.0
        self._resource_version = event.resource_version or self._resource_version
        if isinstance(event, UndecodableObject):
            self._missed_change |= not event.name
            return ListWatchStep((InvalidObject(self._kind, event.namespace, event.name, event.text),))
        self._failures = self._relists = 0
        self.error = ""
        if isinstance(event, Bookmark):
            return ListWatchStep()
        if isinstance(event, Deleted) or event.object is None:
            return ListWatchStep((Delete(self._kind, event.namespace, event.name),))
        return ListWatchStep((Upsert(event.object), *self._ignored_fields(event)))

    def _add_listed(self, item: DecodedObject) -> None:
        if item.object is None:
            self._listed.pop((item.namespace, item.name), None)
        else:
            self._listed[item.namespace, item.name] = pack(item.object)

    def _add_invalid(self, item: UndecodableObject) -> InvalidObject:
        if item.name:
            self._listed[item.namespace, item.name] = None
        else:
            self._missed_change = True
        return InvalidObject(self._kind, item.namespace, item.name, item.text)

    def _ignored_fields(self, item: DecodedObject) -> tuple[IgnoredFields, ...]:
        if not item.ignored_fields:
            return ()
        return (IgnoredFields(self._kind, item.namespace, item.name, ignored_fields_text(item.ignored_fields)),)

    def _complete_list(
        self, resource_version: str, messages: tuple[Message, ...], reconnect_after: float | None
    ) -> ListWatchStep:
        """Emit a complete list as one message, unless it lacks objects that another list may contain."""
        if not resource_version:
            return self._retry(f"cannot list {self.resource}: the list has no resourceVersion", messages)
        if self._missed_change and self._incomplete_lists < MAX_INCOMPLETE_LISTS:
            self._incomplete_lists += 1
            return self._retry(f"cannot list {self.resource}: the list contains undecodable objects", messages)
        objects = PackedSequence(self._kind, [item for item in self._listed.values() if item is not None])
        unreadable = tuple(key for key, item in self._listed.items() if item is None)
        self._discard_list()
        self._resource_version = resource_version  # a missed change stays recorded: a relist follows this watch
        self._failures = self._incomplete_lists = 0
        self._active, self._idle_seconds = True, 0.0
        self._was_listed = True
        self.error = ""
        return ListWatchStep((*messages, Replace(self._kind, objects, unreadable)), reconnect_after)

    def _handle_error_event(self, error: ErrorStatus) -> ListWatchStep:
        if error.code == 410:
            return self._relist(error)
        first = not self._resource_version and not self._listed and not self._missed_change
        if first and error.code not in _TRANSIENT_STATUSES:
            return self._fall_back_to_pages()
        if self._resource_version and error.code not in _TRANSIENT_STATUSES:
            return self._relist(error, immediately=False)  # from the same resourceVersion, it may recur forever
        return self._handle_error(error)

    def _handle_error(self, error: ErrorStatus) -> ListWatchStep:
        if "Too large resource version" in error.message and self._resource_version:
            return self._relist(error)  # the server's history was replaced, for example by a backup
        if error.code in self.optional_statuses:
            return self._continue_without_kind(error)
        if error.code == 406:
            self._accept = ACCEPT_JSON
        verb = "watch" if self._resource_version or self._use_watch_list else "list"
        text = f"cannot {verb} {self.resource}: the API server returned {error}"
        return self._retry(text, at_least=error.retry_after, renew_credentials=error.code == 401)

    def _continue_without_kind(self, error: ErrorStatus) -> ListWatchStep:
        """Continue without an optional kind that the server does not serve (404) or does not allow reading (403).

        Known objects stay. If the kind was never listed, it counts as listed and empty. Attempts become rare.
        """
        problem = "the API server does not serve" if error.code == 404 else "no permission to list and watch"
        effect = "keeping the last known objects" if self._was_listed else self._unavailable_effect
        self._unavailable_error = f"{problem} {self.resource}: {effect} ({error})"
        messages = () if self._was_listed else (Replace(self._kind, ()),)
        return self._retry(self._unavailable_error, messages, max_backoff=MAX_UNAVAILABLE_BACKOFF)

    def _relist(self, error: ErrorStatus, *, immediately: bool = True) -> ListWatchStep:
        """Start a new list: `immediately` the first time, with backoff if no event arrives between relists."""
        self._start_list()
        delay = 0.0 if immediately and not self._relists else max(self._backoff(self._relists), error.retry_after)
        self._relists += 1
        self.error = f"must relist {self.resource}: {error}"
        return ListWatchStep(reconnect_after=delay)

    def _retry(
        self,
        text: str,
        messages: tuple[Message, ...] = (),
        *,
        at_least: float = 0.0,
        max_backoff: float = MAX_BACKOFF,
        renew_credentials: bool = False,
    ) -> ListWatchStep:
        """Try again after the backoff: initial events from the start, pages from the failed one."""
        if self._use_watch_list:
            self._discard_list()
        self._relist_if_missed()
        delay = max(self._backoff(self._failures, max_backoff), at_least)
        self._failures += 1
        self.error = text
        return ListWatchStep(messages, delay, renew_credentials)

    def _relist_if_missed(self) -> None:
        if self._missed_change:
            self._start_list()

    def _start_list(self) -> None:
        self._discard_list()
        self._resource_version, self._missed_change = "", False

    def _discard_list(self) -> None:
        self._listed, self._continue_token = {}, ""

    def _fall_back_to_pages(self) -> ListWatchStep:
        """From now on, list in pages, which every server supports."""
        self._use_watch_list = False
        self._discard_list()
        self._missed_change = False
        return ListWatchStep(reconnect_after=0.0)

    def _drop_field_selector(self) -> ListWatchStep:
        """Continue without the optional field selector: decoding filters the same objects."""
        self._may_drop_field_selector = False
        self._selectors.pop("fieldSelector")
        return ListWatchStep(reconnect_after=0.0)

    def _backoff(self, failures: int, max_backoff: float = MAX_BACKOFF) -> float:
        """Return 0.6 to 1 s, as in client-go, doubled per failure up to `max_backoff`, with jitter of 25%."""
        return min(max_backoff, 0.8 * 2.0 ** min(failures, 10)) * (0.75 + 0.5 * self._random())
