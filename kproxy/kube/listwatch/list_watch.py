"""Following one kind of object at the API server: which request comes next, and what an answer means.

Pure: `ListWatch` sends nothing and knows no time. It follows the Kubernetes API concepts "Efficient detection
of changes", "Streaming lists" (KEP-3157), "Retrieving large result sets in chunks" and "410 Gone responses".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from msgspec import Struct

from kproxy.kube.codec.conversion import HEADLESS_LABEL, PROXY_NAME_LABEL, DecodedObject, ignored_fields_text
from kproxy.kube.codec.json_codec import AnswerError, read_page, read_refusal
from kproxy.kube.codec.streams import JSON, WATCH
from kproxy.kube.codec.watch_events import Bookmark, Deleted, ErrorStatus, Event, UndecodableObject
from kproxy.model.delta import Delete, Delta, Kind, Replace, Upsert
from kproxy.model.packed import PackedSequence, pack
from kproxy.model.types import EndpointSlice, Service, ServiceCIDR

_OURS = f"!{PROXY_NAME_LABEL}"
_OURS_WITH_IP = f"{_OURS},!{HEADLESS_LABEL}"
_SERVED = "spec.clusterIP!=None,spec.type!=ExternalName"


class ApiResource(Struct, frozen=True):
    """A resource of the API: its path, its name as RBAC has it, and the selectors of what is wanted of it.

    `without` tells the user what it means to go without it, "" if kproxy cannot.
    """

    path: str
    name: str
    selectors: dict[str, str] = {}
    without: str = ""


def resource_of(kind: Kind, node_name: str) -> ApiResource:
    """Return the resource of a kind. Of the Nodes only that of `node_name` is selected."""
    if kind is Service:
        return ApiResource("/api/v1/services", "services", {"labelSelector": _OURS, "fieldSelector": _SERVED})
    if kind is EndpointSlice:
        path = "/apis/discovery.k8s.io/v1/endpointslices"
        return ApiResource(path, "endpointslices.discovery.k8s.io", {"labelSelector": _OURS_WITH_IP})
    if kind is ServiceCIDR:
        # New in Kubernetes 1.33, and a ClusterRole from before does not grant it: no reason to program nothing.
        path = "/apis/networking.k8s.io/v1/servicecidrs"
        without = "packets to unallocated service addresses are not dropped"
        return ApiResource(path, "servicecidrs.networking.k8s.io", without=without)
    return ApiResource("/api/v1/nodes", "nodes", {"fieldSelector": f"metadata.name={node_name}"})


class ListWatchRequest(Struct, frozen=True):
    """A GET: path, query parameters, whether the answer is a watch or a page (one body), and its media types."""

    path: str
    params: dict[str, str]
    watch: bool
    accept: str = JSON


class InvalidObject(Struct, frozen=True):
    """An object that cannot be used. Its earlier state, if any, stays; `name` is "" where it is unknown."""

    kind: Kind
    namespace: str
    name: str
    text: str


class IgnoredFields(Struct, frozen=True):
    """Parts of an object that are of no use and left out; `text` says which and why."""

    kind: Kind
    namespace: str
    name: str
    text: str


Message: TypeAlias = Delta | InvalidObject | IgnoredFields


class ListWatchStep(Struct, frozen=True):
    """What follows from an answer.

    `again_after` is None while the present connection goes on; otherwise it is to be closed, and the next
    request sent after that many seconds. `renew` asks for new credentials before that.
    """

    messages: tuple[Message, ...] = ()
    again_after: float | None = None
    renew: bool = False


PAGE_SIZE = 500
"""Objects per page of a list, client-go's default."""
INACTIVITY = 90.0
"""Seconds without a byte after which a connection counts as dead: bookmarks come about every 60 s."""
BOOKMARK_DUE = 0.8
"""The part of `INACTIVITY` after which a bookmark should have come: shorter connections may well end without one."""
SHORT_SILENCES = 20
"""How many seconds of silence on shorter connections count as one second: all is listed anew after an hour of that."""
SILENCES = 2
"""Times `INACTIVITY` without an event or bookmark, over however many connections, after which all is listed anew.

An API server whose etcd was restored from an older backup accepts a resourceVersion that it has not reached yet, and
sends nothing, not even bookmarks, until it has (kubernetes/kubernetes#107457). A new list costs little, since what it
repeats changes nothing."""
SHORTEST_WATCH = 1.0
"""Seconds: a watch that the server ends sooner failed, whatever it says (client-go draws the same line)."""
UNREADABLE_LISTS = 2
"""Lists thrown away because of objects without a readable name, before one is taken without those."""
LONGEST_PAUSE = 24.0
"""Seconds between tries after many failures, 18 to 30 once spread by chance: client-go's bound."""
LONGEST_ABSENCE = 240.0
"""The same, 180 to 300, for a kind that the server does not serve us and that kproxy can do without."""
_TRANSIENT = frozenset({401, 429, 503, 504})
_ABSENCES = frozenset({403, 404})
"""Statuses by which a server says that it does not have a kind, or does not show it to us."""


class ListWatch:
    """The list/watch state machine of one kind.

    Ask `next_request`, then report everything that comes back through the other methods, and do what the
    `ListWatchStep` says. `random` returns a float in [0, 1); `inactivity` is in seconds. `trouble` says on one line
    what is wrong at the moment, "" if nothing is. `absences` are the statuses that are no error, since kproxy can do
    without the kind.
    """

    def __init__(self, kind: Kind, node_name: str, random: Callable[[], float], inactivity: float = INACTIVITY) -> None:
        self.trouble = ""
        self.inactivity = inactivity
        self._kind = kind
        self._random = random
        resource = resource_of(kind, node_name)
        self.resource = resource.name
        self._path, self._params, self._without = resource.path, dict(resource.selectors), resource.without
        self.absences = _ABSENCES if resource.without else frozenset()
        self._absence = ""
        self._was_listed = False
        self._may_drop_fields = kind is Service
        self._by_watch = True
        self._accept = WATCH
        self._proven = False
        self._version = ""  # resourceVersion to watch from; "" while a list is needed
        self._continue = ""
        self._found: dict[tuple[str, str], bytes | None] = {}  # packed; None: exists, but unreadable
        self._missed = False  # something unknown changed: only a list can tell
        self._spoiled_lists = 0
        self._failures = 0
        self._relists = 0
        self._heard = False  # an event or bookmark on the present connection
        self._quiet = 0.0  # seconds without one on the connections before

    @property
    def absent(self) -> bool:
        """Whether the present trouble is only that kproxy has to do, maybe for long, without an optional kind."""
        return bool(self._absence) and self.trouble == self._absence

    def next_request(self) -> ListWatchRequest:
        """Return the request to send now."""
        params = dict(self._params)
        if not self._version and not self._by_watch:
            params["limit"] = str(PAGE_SIZE)
            if self._continue:
                params["continue"] = self._continue
            return ListWatchRequest(self._path, params, watch=False)
        params |= {"watch": "1", "allowWatchBookmarks": "true"}
        if self._version:
            params["resourceVersion"] = self._version
        else:
            params |= {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        params["timeoutSeconds"] = str(300 + int(301 * self._random()))
        return ListWatchRequest(self._path, params, watch=True, accept=self._accept)

    def opened(self) -> None:
        """Note that the server accepted a watch."""
        self._heard = False
        if self._version:
            self.trouble = ""

    def event(self, event: Event) -> ListWatchStep:
        """Take one event of a watch."""
        if isinstance(event, UndecodableObject) and not event.name:
            self._accept = JSON  # protobuf, if it was that, may be what is wrong
        if isinstance(event, ErrorStatus):
            return self._error(event)
        return self._changed(event) if self._version else self._listed(event)

    def page(self, raw: bytes) -> ListWatchStep:
        """Take the body of a list page."""
        try:
            page = read_page(self._kind, raw)
        except AnswerError as error:
            return self._retry(f"a page of the list of {self.resource} cannot be read: {error}")
        problems = tuple(self._note(item) for item in page.items if isinstance(item, UndecodableObject))
        decoded = [item for item in page.items if isinstance(item, DecodedObject)]
        for item in decoded:
            self._keep(item)
        left_out = [each for item in decoded if item.remarks for each in self._left_out(item)]
        before: tuple[Message, ...] = (*problems, *left_out)
        self._continue = page.continue_token
        if page.continue_token:
            return ListWatchStep(before, again_after=0.0)
        return self._complete(page.resource_version, before, again_after=0.0)

    def refused(self, status: int, headers: Mapping[str, str], body: bytes) -> ListWatchStep:
        """Take an HTTP answer other than 200."""
        refusal = read_refusal(status, headers, body)
        if status == 410 or (status == 400 and self._continue):
            return self._relist(refusal)
        invalid = status in {400, 422} or "sendInitialEvents" in refusal.message
        if status == 400 and self._may_drop_fields and "field" in refusal.message:
            return self._drop_fields()
        if invalid and not self._version and self._by_watch:
            return self._fall_back()
        if status == 400 and self._may_drop_fields:
            return self._drop_fields()
        if invalid and self._version:
            return self._relist(refusal)
        return self._refused(refusal)

    def closed(self, lasted: float) -> ListWatchStep:
        """Note that the server ended a watch in good order, `lasted` seconds after opening it."""
        if not self._version:
            return self._retry(f"the list of {self.resource} ended before it was complete")
        if lasted < SHORTEST_WATCH:
            return self._retry(f"the server ends the watch of {self.resource} as soon as it is open")
        self._failures = 0
        self._start_anew_if_missed()
        self._note_quiet(lasted)
        return ListWatchStep(again_after=0.0)

    def failed(self, text: str, lasted: float = 0.0) -> ListWatchStep:
        """Note that there is no connection, or that it broke, `lasted` seconds after opening; `text` says how."""
        verb = "watch" if self._version else "list"
        step = self._retry(f"cannot {verb} {self.resource}: {text}")
        self._note_quiet(lasted)
        return step

    def silent(self) -> ListWatchStep:
        """Note that nothing arrived for `inactivity` seconds."""
        text = f"nothing heard about {self.resource} for {self.inactivity:g} s"
        if self._version:
            self._start_anew_if_missed()
            self.trouble = text
            self._heard = False  # what was heard was heard before the silence
            self._note_quiet(self.inactivity)
            return ListWatchStep(again_after=0.0)
        if self._by_watch and not self._proven:  # ends no initial events: it does not know of them
            self.trouble = text
            return self._fall_back()
        return self._retry(text)

    def _note_quiet(self, seconds: float) -> None:
        """Note that a connection was silent for so long at its end, and start over with a list after too much of it."""
        if not self._version or self._heard:
            return
        # Behind a load balancer that cuts quiet connections, no bookmark may ever come: that alone says little.
        self._quiet += seconds if seconds >= BOOKMARK_DUE * self.inactivity else seconds / SHORT_SILENCES
        if self._quiet >= SILENCES * self.inactivity:
            self.trouble = f"no event or bookmark about {self.resource} for long: listing them anew"
            self._forget()
            self._version, self._missed = "", False

    def _listed(self, event: Event) -> ListWatchStep:
        """Take an event of the initial list by watch."""
        if isinstance(event, Bookmark):
            if not event.ends_initial:  # a server that has never heard of sendInitialEvents
                return self._fall_back()
            self._proven = True
            return self._complete(event.resource_version, (), again_after=None)
        if isinstance(event, UndecodableObject):
            return ListWatchStep((self._note(event),))
        if isinstance(event, Deleted):
            self._found.pop((event.namespace, event.name), None)
        elif isinstance(event, DecodedObject):
            self._keep(event)
            return ListWatchStep(self._left_out(event))
        return ListWatchStep()

    def _changed(self, event: Event) -> ListWatchStep:
        """Take an event after the list."""
        assert not isinstance(event, ErrorStatus)
        self._heard, self._quiet = True, 0.0
        self._version = event.resource_version or self._version
        if isinstance(event, UndecodableObject):
            self._missed |= not event.name
            return ListWatchStep((InvalidObject(self._kind, event.namespace, event.name, event.text),))
        self._failures = self._relists = 0
        self.trouble = ""
        if isinstance(event, Bookmark):
            return ListWatchStep()
        if isinstance(event, Deleted) or event.object is None:
            return ListWatchStep((Delete(self._kind, event.namespace, event.name),))
        return ListWatchStep((Upsert(event.object), *self._left_out(event)))

    def _keep(self, item: DecodedObject) -> None:
        if item.object is None:
            self._found.pop((item.namespace, item.name), None)
        else:
            self._found[item.namespace, item.name] = pack(item.object)

    def _left_out(self, item: DecodedObject) -> tuple[IgnoredFields, ...]:
        if not item.remarks:
            return ()
        return (IgnoredFields(self._kind, item.namespace, item.name, ignored_fields_text(item.remarks)),)

    def _note(self, item: UndecodableObject) -> InvalidObject:
        if item.name:
            self._found[item.namespace, item.name] = None
        else:
            self._missed = True
        return InvalidObject(self._kind, item.namespace, item.name, item.text)

    def _complete(self, version: str, before: tuple[Message, ...], again_after: float | None) -> ListWatchStep:
        """Turn a complete list into one message, unless it may lack objects that a new one would have."""
        if not version:
            return self._retry(f"the list of {self.resource} has no resourceVersion", before)
        if self._missed and self._spoiled_lists < UNREADABLE_LISTS:
            self._spoiled_lists += 1
            self._start_anew_if_missed()
            return self._retry(f"the list of {self.resource} holds what cannot be read", before)
        objects = PackedSequence(self._kind, [item for item in self._found.values() if item is not None])
        unreadable = tuple(key for key, item in self._found.items() if item is None)
        self._forget()
        self._version = version  # what was missed stays so: the next list, after this watch, may have it
        self._failures = self._spoiled_lists = 0
        self._heard, self._quiet = True, 0.0
        self._was_listed = True
        self.trouble = ""
        return ListWatchStep((*before, Replace(self._kind, objects, unreadable)), again_after)

    def _error(self, refusal: ErrorStatus) -> ListWatchStep:
        """Take an ERROR event."""
        if refusal.code == 410:
            return self._relist(refusal)
        first = not self._version and not self._found and not self._missed
        if first and refusal.code not in _TRANSIENT:
            return self._fall_back()
        if self._version and refusal.code not in _TRANSIENT:
            return self._relist(refusal, at_once=False)  # from the same version on, it may well come for ever
        return self._refused(refusal)

    def _refused(self, refusal: ErrorStatus) -> ListWatchStep:
        if "Too large resource version" in refusal.message and self._version:
            return self._relist(refusal)  # the server's past was replaced, by a backup for instance
        if refusal.code in self.absences:
            return self._absent(refusal)
        if refusal.code == 406:
            self._accept = JSON
        verb = "watch" if self._version or self._by_watch else "list"
        text = f"the API server refuses to {verb} {self.resource}: {refusal}"
        renew = refusal.code == 401
        return self._retry(text, at_least=refusal.retry_after, renew=renew)

    def _absent(self, refusal: ErrorStatus) -> ListWatchStep:
        """Go on without a kind that the server does not have (404) or does not show us (403).

        What is known of it stays; if nothing is, it counts as listed and empty. The tries become rare.
        """
        missing = refusal.code == 404
        text = "the API server does not have" if missing else "permission is missing to list and watch"
        effect = "what was known of them stays in force" if self._was_listed else self._without
        self._absence = f"{text} {self.resource}: {effect} ({refusal})"
        messages = () if self._was_listed else (Replace(self._kind, ()),)
        return self._retry(self._absence, messages, longest=LONGEST_ABSENCE)

    def _relist(self, refusal: ErrorStatus, *, at_once: bool = True) -> ListWatchStep:
        """Start over with a list: maybe at once, but slower and slower while that leads here again."""
        self._forget()
        self._version, self._missed = "", False
        delay = 0.0 if at_once and not self._relists else max(self._backoff(self._relists), refusal.retry_after)
        self._relists += 1
        self.trouble = f"listing {self.resource} anew: {refusal}"
        return ListWatchStep(again_after=delay)

    def _retry(
        self,
        text: str,
        messages: tuple[Message, ...] = (),
        *,
        at_least: float = 0.0,
        longest: float = LONGEST_PAUSE,
        renew: bool = False,
    ) -> ListWatchStep:
        """Try again later: a stream of initial events from its beginning, pages from the failed one."""
        if self._by_watch:
            self._forget()
        self._start_anew_if_missed()
        delay = max(self._backoff(self._failures, longest), at_least)
        self._failures += 1
        self.trouble = text
        return ListWatchStep(messages, delay, renew)

    def _start_anew_if_missed(self) -> None:
        if self._missed:
            self._forget()
            self._version, self._missed = "", False

    def _fall_back(self) -> ListWatchStep:
        """List by pages from now on, as every server can."""
        self._by_watch = False
        self._forget()
        self._missed = False
        return ListWatchStep(again_after=0.0)

    def _drop_fields(self) -> ListWatchStep:
        """Ask without the optional field selector: what it keeps away is filtered by decoding too."""
        self._may_drop_fields = False
        self._params.pop("fieldSelector")
        return ListWatchStep(again_after=0.0)

    def _forget(self) -> None:
        self._found, self._continue = {}, ""

    def _backoff(self, failures: int, longest: float = LONGEST_PAUSE) -> float:
        """Return 0.6 to 1 s, as client-go does, doubled per failure up to `longest`, which is spread by chance too."""
        return min(longest, 0.8 * 2.0 ** min(failures, 10)) * (0.75 + 0.5 * self._random())
