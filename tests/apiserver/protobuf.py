"""The server's protobuf encoder, built on Google's package with the field numbers of k8s.io/api 1.36.

It shares no code with kproxy's decoder. A field marked `!` is a plain value in Go, which the server writes even if it
is empty. The other fields are pointers, lists and maps, which are omitted if empty.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

MEDIA_TYPE = "application/vnd.kubernetes.protobuf"
MAGIC = b"k8s\0"

_MESSAGES = {
    "Unknown": "typeMeta=1:TypeMeta raw=2:bytes contentEncoding=3:string! contentType=4:string!",
    "TypeMeta": "apiVersion=1:string! kind=2:string!",
    "WatchEvent": "type=1:string! object=2:RawExtension",
    "RawExtension": "raw=1:bytes",
    "Time": "seconds=1:int64! nanos=2:int32!",
    "IntOrString": "type=1:int64! intVal=2:int32! strVal=3:string!",
    "Quantity": "string=1:string!",
    "FieldsV1": "Raw=1:bytes",
    "StringEntry": "key=1:string! value=2:string!",
    "QuantityEntry": "key=1:string! value=2:Quantity!",
    "ListMeta": "selfLink=1:string! resourceVersion=2:string! continue=3:string! remainingItemCount=4:int64",
    "Status": "metadata=1:ListMeta! status=2:string! message=3:string! reason=4:string! details=5:StatusDetails"
    " code=6:int32!",
    "StatusDetails": "name=1:string! group=2:string! kind=3:string! causes=4:StatusCause* retryAfterSeconds=5:int32!"
    " uid=6:string!",
    "StatusCause": "reason=1:string! message=2:string! field=3:string!",
    "ObjectMeta": "name=1:string! generateName=2:string! namespace=3:string! selfLink=4:string! uid=5:string!"
    " resourceVersion=6:string! generation=7:int64! creationTimestamp=8:Time! deletionTimestamp=9:Time"
    " deletionGracePeriodSeconds=10:int64 labels=11:StringEntry* annotations=12:StringEntry*"
    " ownerReferences=13:OwnerReference* finalizers=14:string* managedFields=17:ManagedFieldsEntry*",
    "OwnerReference": "kind=1:string! name=3:string! uid=4:string! apiVersion=5:string! controller=6:bool"
    " blockOwnerDeletion=7:bool",
    "ManagedFieldsEntry": "manager=1:string! operation=2:string! apiVersion=3:string! time=4:Time"
    " fieldsType=6:string! fieldsV1=7:FieldsV1 subresource=8:string!",
    "Condition": "type=1:string! status=2:string! observedGeneration=3:int64! lastTransitionTime=4:Time!"
    " reason=5:string! message=6:string!",
    "Service": "metadata=1:ObjectMeta! spec=2:ServiceSpec! status=3:ServiceStatus!",
    "ServiceSpec": "ports=1:ServicePort* selector=2:StringEntry* clusterIP=3:string! type=4:string!"
    " externalIPs=5:string* sessionAffinity=7:string! loadBalancerIP=8:string! loadBalancerSourceRanges=9:string*"
    " externalName=10:string! externalTrafficPolicy=11:string! healthCheckNodePort=12:int32!"
    " publishNotReadyAddresses=13:bool! sessionAffinityConfig=14:SessionAffinityConfig ipFamilyPolicy=17:string"
    " clusterIPs=18:string* ipFamilies=19:string* allocateLoadBalancerNodePorts=20:bool loadBalancerClass=21:string"
    " internalTrafficPolicy=22:string trafficDistribution=23:string",
    "ServicePort": "name=1:string! protocol=2:string! port=3:int32! targetPort=4:IntOrString! nodePort=5:int32!"
    " appProtocol=6:string",
    "SessionAffinityConfig": "clientIP=1:ClientIPConfig",
    "ClientIPConfig": "timeoutSeconds=1:int32",
    "ServiceStatus": "loadBalancer=1:LoadBalancerStatus! conditions=2:Condition*",
    "LoadBalancerStatus": "ingress=1:LoadBalancerIngress*",
    "LoadBalancerIngress": "ip=1:string! hostname=2:string! ipMode=3:string ports=4:PortStatus*",
    "PortStatus": "port=1:int32! protocol=2:string! error=3:string",
    "EndpointSlice": "metadata=1:ObjectMeta! endpoints=2:Endpoint* ports=3:EndpointPort* addressType=4:string!",
    "Endpoint": "addresses=1:string* conditions=2:EndpointConditions! hostname=3:string targetRef=4:ObjectReference"
    " deprecatedTopology=5:StringEntry* nodeName=6:string zone=7:string hints=8:EndpointHints",
    "EndpointConditions": "ready=1:bool serving=2:bool terminating=3:bool",
    "EndpointHints": "forZones=1:ForZone* forNodes=2:ForNode*",
    "ForZone": "name=1:string!",
    "ForNode": "name=1:string!",
    "EndpointPort": "name=1:string protocol=2:string port=3:int32 appProtocol=4:string",
    "ObjectReference": "kind=1:string! namespace=2:string! name=3:string! uid=4:string! apiVersion=5:string!"
    " resourceVersion=6:string! fieldPath=7:string!",
    "Node": "metadata=1:ObjectMeta! spec=2:NodeSpec! status=3:NodeStatus!",
    "NodeSpec": "podCIDR=1:string! externalID=2:string! providerID=3:string! unschedulable=4:bool! taints=5:Taint*"
    " podCIDRs=7:string*",
    "Taint": "key=1:string! value=2:string! effect=3:string! timeAdded=4:Time",
    "NodeStatus": "capacity=1:QuantityEntry* allocatable=2:QuantityEntry* phase=3:string! conditions=4:NodeCondition*"
    " addresses=5:NodeAddress* daemonEndpoints=6:NodeDaemonEndpoints! nodeInfo=7:NodeSystemInfo!"
    " images=8:ContainerImage*",
    "NodeCondition": "type=1:string! status=2:string! lastHeartbeatTime=3:Time! lastTransitionTime=4:Time!"
    " reason=5:string! message=6:string!",
    "NodeAddress": "type=1:string! address=2:string!",
    "NodeDaemonEndpoints": "kubeletEndpoint=1:DaemonEndpoint!",
    "DaemonEndpoint": "Port=1:int32!",
    "NodeSystemInfo": "machineID=1:string! systemUUID=2:string! bootID=3:string! kernelVersion=4:string!"
    " osImage=5:string! containerRuntimeVersion=6:string! kubeletVersion=7:string! kubeProxyVersion=8:string!"
    " operatingSystem=9:string! architecture=10:string!",
    "ContainerImage": "names=1:string* sizeBytes=2:int64!",
    "ServiceCIDR": "metadata=1:ObjectMeta! spec=2:ServiceCIDRSpec! status=3:ServiceCIDRStatus!",
    "ServiceCIDRSpec": "cidrs=1:string*",
    "ServiceCIDRStatus": "conditions=1:Condition*",
    **{f"{kind}List": f"metadata=1:ListMeta! items=2:{kind}*" for kind in ("Service", "EndpointSlice", "Node")},
    "ServiceCIDRList": "metadata=1:ListMeta! items=2:ServiceCIDR*",
}

_SCALARS = {
    "string": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    "bytes": descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
    "bool": descriptor_pb2.FieldDescriptorProto.TYPE_BOOL,
    "int32": descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
    "int64": descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
}
_EMPTY: dict[str, Any] = {"string": "", "bytes": b"", "bool": False, "int32": 0, "int64": 0}


@dataclass(frozen=True)
class _Field:
    name: str
    number: int
    type: str
    always: bool
    repeated: bool


def _fields(text: str) -> Iterator[_Field]:
    for word in text.split():
        name, _, rest = word.partition("=")
        number, _, kind = rest.partition(":")
        yield _Field(name, int(number), kind.rstrip("!*"), kind.endswith("!"), kind.endswith("*"))


_FIELDS = {name: tuple(_fields(text)) for name, text in _MESSAGES.items()}


KINDS = frozenset(_FIELDS)
"""The kinds that can be encoded. kube-apiserver encodes all kinds except custom resources."""


def _classes() -> dict[str, type[Message]]:
    file = descriptor_pb2.FileDescriptorProto(name="tests.proto", package="tests", syntax="proto2")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field in fields:
            label = (
                descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
                if field.repeated
                else descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL
            )
            added = message.field.add(name=field.name, number=field.number, label=label)
            if field.type in _SCALARS:
                added.type = _SCALARS[field.type]
            else:
                added.type = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
                added.type_name = f".tests.{field.type}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tests.{name}")) for name in _FIELDS}


_CLASSES = _classes()


def encode(name: str, data: Any) -> bytes:
    """Encode an object, given in JSON form, without envelope. Raises `KeyError` for an unknown field."""
    message = _CLASSES[name]()
    _fill(message, name, data)
    raw: bytes = message.SerializeToString(deterministic=True)
    return raw


def enveloped(body: dict[str, Any]) -> bytes:
    """Encode an object in the envelope (runtime.Unknown) that names its apiVersion and kind."""
    kind = body["kind"]
    bare = {name: value for name, value in body.items() if name not in {"kind", "apiVersion"}}
    return envelope(body["apiVersion"], kind, encode(kind, bare))


def envelope(api_version: str, kind: str, raw: bytes) -> bytes:
    return MAGIC + encode("Unknown", {"typeMeta": {"apiVersion": api_version, "kind": kind}, "raw": raw})


def frame(change: str, body: dict[str, Any]) -> bytes:
    """Encode one watch event with its length prefix. The object has an envelope, the event itself has none."""
    event = encode("WatchEvent", {"type": change, "object": {"raw": enveloped(body)}})
    return framed(event)


def framed(event: bytes) -> bytes:
    return struct.pack(">I", len(event)) + event


def frame_of_line(line: bytes) -> bytes:
    """Encode the event of a JSON watch line."""
    event = json.loads(line)
    return frame(event["type"], event["object"])


def _fill(message: Message, name: str, data: Any) -> None:
    data = _as_message(name, data)
    unknown = set(data) - {field.name for field in _FIELDS[name]} - {"kind", "apiVersion"}
    if unknown:
        raise KeyError(f"{name} has no {sorted(unknown)}")
    for field in _FIELDS[name]:
        value = data.get(field.name)
        if field.repeated:
            _fill_list(getattr(message, field.name), field.type, value or [])
        elif value is None and not field.always:
            continue
        elif field.type in _SCALARS:
            setattr(message, field.name, _EMPTY[field.type] if value is None else value)
        else:
            inner = getattr(message, field.name)
            inner.SetInParent()
            if field.type != "Time" or value is not None:  # a zero time is an empty message
                _fill(inner, field.type, value if value is not None else {})


def _fill_list(target: Any, kind: str, values: Any) -> None:
    if isinstance(values, dict):
        values = [{"key": key, "value": value} for key, value in values.items()]
    for value in values:
        if kind in _SCALARS:
            target.append(value)
        else:
            _fill(target.add(), kind, value)


def _as_message(name: str, data: Any) -> Any:
    """Convert a plain JSON value to the message that protobuf uses for it."""
    if name == "Time" and isinstance(data, str):
        return {"seconds": int(datetime.fromisoformat(data).timestamp()), "nanos": 0}
    if name == "IntOrString" and isinstance(data, int):
        return {"type": 0, "intVal": data}
    if name == "IntOrString" and isinstance(data, str):
        return {"type": 1, "strVal": data}
    if name == "Quantity" and isinstance(data, str):
        return {"string": data}
    if name == "FieldsV1":
        return {"Raw": json.dumps(data, separators=(",", ":")).encode()}
    return data
