"""The list/watch protocol for one kind of object, as a state machine without I/O or a clock. Pure.

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
from kproxy.kube.codec.watch_events import Bookmark, Deleted, ErrorStatus, Event, Unchanged, UndecodableObject
from kproxy.model.delta import Delete, Delta, Kind, Replace, Upsert
from kproxy.model.packed_objects import PackedSequence, object_key, pack, split_object_key
from kproxy.model.types import EndpointSlice, Service, ServiceCIDR

PAGE_SIZE = 500
"""Maximum number of objects per page of a list. It is client-go's default."""
PAGE_DIVISOR = 5
"""If a page is too large, the next attempt asks for a page with fewer objects: the number is divided by this."""
MAX_PAGE_BYTES = 64 << 20
"""Default maximum size of a page of a list, in bytes, after decompression."""
MAX_RETRY_AFTER = 60.0
"""Maximum number of seconds for which a request of the server to wait is honored, before jitter."""
RETRY_AFTER_JITTER = 0.5
"""A request of the server to wait is extended by a random share of it, at most this one.

An overloaded server asks all clients to wait for the same time. Without jitter, they would all come back at once.
"""
INACTIVITY = 90.0
"""Seconds without data after which a connection counts as dead.

The API server sends a bookmark about every 60 s.
"""
BOOKMARK_DUE = 0.8
"""Fraction of the inactivity timeout after which a connection should have received a bookmark.

A connection that ends earlier may not have received one yet.
"""
SHORT_IDLE_DIVISOR = 20
"""Divisor for the idle time of a connection that ended before a bookmark was due (see `BOOKMARK_DUE`).

With the default inactivity timeout, such connections cause a relist only after an hour of idle time in total.
"""
MAX_IDLE_PERIODS = 2
"""Idle time (without an event or bookmark) that causes a relist, as a multiple of the inactivity timeout.

Idle time is added up over consecutive connections.

The relist is necessary if etcd was restored from an older backup. The API server then accepts a watch from a
resourceVersion that it has not reached yet. Until it reaches that version, it sends nothing, not even bookmarks
(kubernetes/kubernetes#107457). A relist is cheap, because unchanged objects cause no further work.
"""
MIN_WATCH_SECONDS = 1.0
"""Minimum duration of a successful watch, in seconds. client-go uses the same limit.

If the server closes a watch sooner, the watch counts as failed, even if the server closed it cleanly.
"""
MAX_INCOMPLETE_LISTS = 2
"""Maximum number of consecutive lists to discard because they contain objects whose names cannot be decoded.

The next list is used even if it contains such objects, which are then ignored.
"""
MAX_BACKOFF = 24.0
"""Maximum number of seconds between attempts, before jitter. With jitter, it is 18 to 30 s.

In client-go, it is 30 to 60 s.
"""
MAX_UNAVAILABLE_BACKOFF = 240.0
"""Like `MAX_BACKOFF`, for an optional kind that the server does not serve or that kproxy is not allowed to read.

With jitter, it is 180 to 300 s.
"""

_TRANSIENT_STATUSES = frozenset({401, 429, 503, 504})
_UNAVAILABLE_STATUSES = frozenset({403, 404})
"""The HTTP statuses of kinds that kproxy is not allowed to read (403) or that the server does not serve (404)."""
_NOT_OTHER_PROXY = f"!{PROXY_NAME_LABEL}"
_NOT_HEADLESS = f"{_NOT_OTHER_PROXY},!{HEADLESS_LABEL}"
_WITH_CLUSTER_IP = "spec.clusterIP!=None,spec.type!=ExternalName"


class ApiResource(Struct, frozen=True):
    """An API resource: its path, its name as in `kubectl get NAME`, and the selectors of its lists and watches.

    `unavailable_effect` says what does not work without an optional resource. It is "" for a required resource.
    """

    path: str
    name: str
    selectors: dict[str, str] = {}
    unavailable_effect: str = ""


class ListWatchRequest(Struct, frozen=True):
    """A GET request, either for a watch (if `watch` is true) or for one page of a list.

    `accept` is the Accept header.
    """

    path: str
    params: dict[str, str]
    watch: bool
    accept: str = ACCEPT_JSON


class InvalidObject(Struct, frozen=True):
    """An object that is invalid or cannot be decoded. Its last valid state stays in use.

    `name` is "" if the object's name cannot be decoded either. `text` says what is wrong.
    """

    kind: Kind
    namespace: str
    name: str
    text: str


class IgnoredFields(Struct, frozen=True):
    """An object with endpoints or ports that cannot be used. `text` says which ones, and why."""

    kind: Kind
    namespace: str
    name: str
    text: str


Message: TypeAlias = Delta | InvalidObject | IgnoredFields


class ListWatchStep(Struct, frozen=True):
    """What the caller must do next: deliver the `messages`, then continue as follows.

    If `reconnect_after` is None, keep reading the current response. Otherwise, close the response, and send the next
    request after `reconnect_after` seconds. If `renew_credentials` is true, renew the credentials before that request.
    """

    messages: tuple[Message, ...] = ()
    reconnect_after: float | None = None
    renew_credentials: bool = False


NOTHING = ListWatchStep()
"""A step without messages, after which the caller keeps reading the current response."""


def resource_of(kind: Kind, node_name: str) -> ApiResource:
    """Return the resource of a kind. The selector for Nodes selects only the Node `node_name`."""
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

    The caller sends the requests that `next_request` returns. It reports the outcome to the `handle_...` methods and
    carries out the `ListWatchStep` that they return. `random` returns a float in [0, 1). `inactivity` is the inactivity
    timeout in seconds: the caller must report a connection that receives no data for that long.

    `error` is the current problem as one line, or "" if there is none. `optional_statuses` are the HTTP
    statuses with which the server reports that an optional kind is not available. The set is empty for a required kind.
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
        self._resource_version = ""  # the version to watch from, or "" until a list is complete
        self._continue_token = ""
        self._page_size = PAGE_SIZE
        self._listed: dict[str, bytes | None] = {}  # packed objects by key; None: exists, but is invalid
        self._was_listed = False
        self._missed_change = False  # an object whose name cannot be decoded has changed: relist
        self._incomplete_lists = 0
        self._failures = 0
        self._relists = 0
        self._active = False  # whether an event or bookmark arrived on this connection
        self._idle_seconds = 0.0  # of ended watches, since the last event or bookmark

    @property
    def unavailable(self) -> bool:
        """Whether the current error only means that an optional kind is not available from the server."""
        return bool(self._unavailable_error) and self.error == self._unavailable_error

    def next_request(self) -> ListWatchRequest:
        """Return the next request to send."""
        params = dict(self._selectors)
        if not self._resource_version and not self._use_watch_list:
            params["limit"] = str(self._page_size)
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
        """Handle the start of a successful response (status 200) to a watch request, before any event."""
        self._active = False
        if self._resource_version:
            self.error = ""

    def handle_event(self, event: Event) -> ListWatchStep:
        """Handle an event of a watch."""
        if isinstance(event, UndecodableObject) and not event.name:
            self._accept = ACCEPT_JSON  # if the watch used protobuf, that may be the cause
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
        """Handle the end of a watch that the server closed cleanly. The watch lasted `duration` seconds."""
        if not self._resource_version:
            return self._retry(f"cannot list {self.resource}: the watch ended before the end of the initial events")
        if duration < MIN_WATCH_SECONDS:
            return self._retry(f"cannot watch {self.resource}: the API server closes the watch immediately")
        self._failures = 0
        self._relist_if_missed()
        self._add_idle_time(duration)
        return ListWatchStep(reconnect_after=0.0)

    def handle_failure(self, text: str, duration: float = 0.0) -> ListWatchStep:
        """Handle a failed request or a broken connection.

        `duration` is the number of seconds for which a watch was open, or 0 if no watch had started.
        """
        verb = "watch" if self._resource_version else "list"
        step = self._retry(f"cannot {verb} {self.resource}: {text}")
        self._add_idle_time(duration)
        return step

    def handle_oversize(self, text: str) -> ListWatchStep:
        """Handle a page or an event that is larger than the caller accepts. `text` says which maximum it exceeds.

        The objects are listed in pages, after the backoff. If a page was too large, the next one has fewer objects.
        """
        listing = not self._resource_version and not self._use_watch_list
        if listing and self._page_size > 1:
            self._page_size = max(1, self._page_size // PAGE_DIVISOR)
            return self._retry(f"cannot list {self.resource}: {text}; listing {self._page_size} objects at a time")
        if listing:
            return self._retry(f"cannot list {self.resource}: {text}, although it has only one object")
        self._accept = ACCEPT_JSON  # if the watch used protobuf, that may be the cause
        self._use_watch_list = False
        self._start_list()
        delay = self._backoff(max(self._relists, self._failures))
        self._relists += 1
        self.error = f"must relist {self.resource} in pages: {text}"
        return ListWatchStep(reconnect_after=delay)

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
        if self._use_watch_list and not self._watch_list_works:  # the server may not support sendInitialEvents
            self.error = text
            return self._fall_back_to_pages()
        return self._retry(text)

    def _add_idle_time(self, seconds: float) -> None:
        """Count an ended watch as idle time, unless an event or bookmark arrived on it.

        `seconds` is the watch's duration. If the watch ended before a bookmark was due, the duration is divided by
        `SHORT_IDLE_DIVISOR` before it is added. If the idle time reaches its limit (see `MAX_IDLE_PERIODS`), a new list
        is started.
        """
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
            if not event.initial_events_end:  # the server does not support sendInitialEvents
                return self._fall_back_to_pages()
            self._watch_list_works = True
            return self._complete_list(event.resource_version, (), reconnect_after=None)
        if isinstance(event, UndecodableObject):
            return ListWatchStep((self._add_invalid(event),))
        if isinstance(event, Deleted):
            self._listed.pop(object_key(event.namespace, event.name), None)
        elif isinstance(event, DecodedObject):
            self._add_listed(event)
            return ListWatchStep(self._ignored_fields(event)) if event.ignored_fields else NOTHING
        return NOTHING

    def _handle_change(self, event: Event) -> ListWatchStep:
        """Handle an event of a watch that follows a complete list."""
        assert not isinstance(event, ErrorStatus)
        self._active, self._idle_seconds = True, 0.0
        self._resource_version = event.resource_version or self._resource_version
        if isinstance(event, UndecodableObject):
            self._missed_change |= not event.name
            return ListWatchStep((InvalidObject(self._kind, event.namespace, event.name, event.text),))
        self._failures = self._relists = 0
        self.error = ""
        if isinstance(event, Bookmark | Unchanged):
            return NOTHING
        if isinstance(event, Deleted) or event.object is None:
            return ListWatchStep((Delete(self._kind, event.namespace, event.name),))
        return ListWatchStep((Upsert(event.object), *self._ignored_fields(event)))

    def _add_listed(self, item: DecodedObject) -> None:
        if item.object is None:
            self._listed.pop(object_key(item.namespace, item.name), None)
        else:
            self._listed[object_key(item.namespace, item.name)] = pack(item.object)

    def _add_invalid(self, item: UndecodableObject) -> InvalidObject:
        if item.name:
            self._listed[object_key(item.namespace, item.name)] = None
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
        """Emit a complete list as one message.

        If the list lacks objects whose names cannot be decoded, discard it and list again, at most
        `MAX_INCOMPLETE_LISTS` times in a row.
        """
        if not resource_version:
            return self._retry(f"cannot list {self.resource}: the list has no resourceVersion", messages)
        if self._missed_change and self._incomplete_lists < MAX_INCOMPLETE_LISTS:
            self._incomplete_lists += 1
            return self._retry(f"cannot list {self.resource}: the list contains undecodable objects", messages)
        objects = PackedSequence(self._kind, {key: item for key, item in self._listed.items() if item is not None})
        unreadable = tuple(split_object_key(key) for key, item in self._listed.items() if item is None)
        self._discard_list()
        self._resource_version = resource_version  # _missed_change stays set: relist after this watch
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
            return self._relist(error, immediately=False)  # a watch from the same version could fail forever
        return self._handle_error(error)

    def _handle_error(self, error: ErrorStatus) -> ListWatchStep:
        if "Too large resource version" in error.message and self._resource_version:
            return self._relist(error)  # etcd was replaced or restored from a backup
        if error.code in self.optional_statuses:
            return self._continue_without_kind(error)
        if error.code == 406:
            self._accept = ACCEPT_JSON
        verb = "watch" if self._resource_version or self._use_watch_list else "list"
        text = f"cannot {verb} {self.resource}: the API server returned {error}{_capped_text(error)}"
        return self._retry(text, at_least=self._retry_after(error), renew_credentials=error.code == 401)

    def _continue_without_kind(self, error: ErrorStatus) -> ListWatchStep:
        """Continue without an optional kind.

        The server does not serve the kind (404), or kproxy is not allowed to read it (403). Known objects are kept. If
        the kind was never listed, an empty list is emitted. The time between attempts grows to a few minutes (see
        `MAX_UNAVAILABLE_BACKOFF`).
        """
        problem = "the API server does not serve" if error.code == 404 else "no permission to list and watch"
        effect = "keeping the last known objects" if self._was_listed else self._unavailable_effect
        self._unavailable_error = f"{problem} {self.resource}: {effect} ({error})"
        messages = () if self._was_listed else (Replace(self._kind, ()),)
        return self._retry(self._unavailable_error, messages, max_backoff=MAX_UNAVAILABLE_BACKOFF)

    def _relist(self, error: ErrorStatus, *, immediately: bool = True) -> ListWatchStep:
        """Start a new list after the backoff.

        If `immediately` is true, the first relist after an event or bookmark is not delayed.
        """
        self._start_list()
        delay = (
            0.0 if immediately and not self._relists else max(self._backoff(self._relists), self._retry_after(error))
        )
        self._relists += 1
        self.error = f"must relist {self.resource}: {error}{_capped_text(error)}"
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
        """Send the request again after the backoff. `text` describes the current problem.

        A list that is streamed as initial events starts from the beginning. A list in pages continues with the page
        that failed, unless a change was missed. The backoff is at least `at_least` seconds.
        """
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
        self._page_size = PAGE_SIZE

    def _discard_list(self) -> None:
        self._listed, self._continue_token = {}, ""

    def _fall_back_to_pages(self) -> ListWatchStep:
        """Start a new list, and from now on list in pages, which every server supports."""
        self._use_watch_list = False
        self._discard_list()
        self._missed_change = False
        return ListWatchStep(reconnect_after=0.0)

    def _drop_field_selector(self) -> ListWatchStep:
        """Continue without the field selector, which is optional: decoding ignores the same objects."""
        self._may_drop_field_selector = False
        self._selectors.pop("fieldSelector")
        return ListWatchStep(reconnect_after=0.0)

    def _backoff(self, failures: int, max_backoff: float = MAX_BACKOFF) -> float:
        """Return the number of seconds to wait after the given number of earlier failures.

        The delay is 0.8 s (as in client-go), doubled for each failure, at most `max_backoff`, with a jitter of ±25%.
        """
        return min(max_backoff, 0.8 * 2.0 ** min(failures, 10)) * (0.75 + 0.5 * self._random())

    def _retry_after(self, error: ErrorStatus) -> float:
        """Return the seconds to wait at least before the next request, with jitter: see `RETRY_AFTER_JITTER`."""
        return min(error.retry_after, MAX_RETRY_AFTER) * (1.0 + RETRY_AFTER_JITTER * self._random())


def _capped_text(error: ErrorStatus) -> str:
    """Return the part of a message that says that the server asked for a longer wait than `MAX_RETRY_AFTER`, or ""."""
    if error.retry_after <= MAX_RETRY_AFTER:
        return ""
    longest = MAX_RETRY_AFTER * (1.0 + RETRY_AFTER_JITTER)
    return f" (it asked to wait {error.retry_after:g} s, but kproxy waits at most {longest:g} s)"
