"""Stand-ins for the stores of other vendors: they keep objects in the real S3 server, and refuse what vendors refuse.

A stand-in is an HTTP proxy (RFC 9112, 3.2.2): every process that has it as `http_proxy` reaches it under the vendor's
own host names. It checks each signature like the vendor, sends the request to the real server with that server's
credentials, and chooses the least friendly behaviour that the vendor's documentation allows.
"""

import hashlib
import hmac
import http.client
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from job.demo.server import S3Server

_PAGE = 3
"""Objects on one page of a listing."""
CHUNKED = "aws-chunked encoding is not supported with the specified x-amz-content-sha256 value."


@dataclass(frozen=True)
class Store:
    """How a store differs from Amazon S3. The sources are in docs/object-stores.md.

    Args:
        host: host name of the region; virtual-hosted buckets are names below it.
        path_style: error code that refuses path-style addressing; None: path-style addressing is accepted.
        if_none_match: what an upload with this header does if the object exists. ``lies``: it is answered 412, but
            replaces the content; ``inverted``: it is refused if the object is absent.
        forbid_overwrite: the vendor's own header that forbids overwriting.
        taken: error code of the vendor's 409 answer.
        has_chunks: True if uploads may use the encoding aws-chunked.
        has_new_lists: True if the store supports the pagination of ListObjectsV2.
        answers_put_by_path: True if an upload with path-style addressing is answered 404 NoSuchKey.
        key_prefix: prefix that the client's credentials may use and list; a missing object is answered 403.
        may_list: True if the credentials may list.
        is_public: True if objects can be read without a signature; nothing else is allowed then.
    """

    host: str
    path_style: str | None = None
    if_none_match: Literal["honoured", "ignored", "refused", "lies", "inverted"] = "honoured"
    forbid_overwrite: str | None = None
    taken: str = "FileAlreadyExists"
    has_chunks: bool = False
    has_new_lists: bool = True
    answers_put_by_path: bool = False
    key_prefix: str | None = None
    may_list: bool = True
    is_public: bool = False


OSS = Store("oss-cn-hangzhou.aliyuncs.com", "SecondLevelDomainForbidden", "ignored", "x-oss-forbid-overwrite")
OSS_REFUSING = Store(
    "s3.oss-cn-beijing.aliyuncs.com", "SecondLevelDomainForbidden", "refused", "x-oss-forbid-overwrite"
)
COS = Store("cos.ap-guangzhou.myqcloud.com", "PathStyleDomainForbidden", "ignored", "x-cos-forbid-overwrite")
OBS = Store(
    host="obs.cn-north-4.myhuaweicloud.com",
    path_style="VirtualHostDomainRequired",
    if_none_match="ignored",
    forbid_overwrite="x-obs-forbid-overwrite",
    taken="ObjectAlreadyExists",
    has_new_lists=False,
    answers_put_by_path=True,
)
TOS = Store("tos-s3-cn-beijing.volces.com", "InvalidPathAccess", "ignored", "x-tos-forbid-overwrite", "Conflict")
PLAIN = Store("s3.example.com", if_none_match="ignored")
"""A store without conditional writes, like older Ceph and MinIO, and versioned buckets of OSS and COS."""
LIMITED = Store("s3.example.com", key_prefix="team/")
PUBLIC = Store("s3.example.com", is_public=True)


@dataclass
class Seen:
    """A request that the stand-in received."""

    method: str
    bucket: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    is_virtual: bool
    is_signed: bool

    @property
    def lists(self) -> bool:
        """True if the request lists the bucket."""
        return self.method == "GET" and not self.key


@dataclass
class StandIn:
    """A running stand-in."""

    address: str
    """Address for `http_proxy`; with TLS, the endpoint itself."""
    endpoint_url: str
    requests: list[Seen] = field(default_factory=list)


@contextmanager
def stand_in(store: Store, server: S3Server, certificate: Path | None = None) -> Iterator[StandIn]:
    """Run a stand-in in front of the real server. With `certificate` (a file with certificate and key) it uses TLS."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as listener:
        listener.daemon_threads = True
        address = f"127.0.0.1:{listener.server_port}"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            listener.socket = context.wrap_socket(listener.socket, server_side=True)
            made = StandIn(address, f"https://{address}")
            store = Store(**{**vars(store), "host": "127.0.0.1"})
        else:
            made = StandIn(f"http://{address}", f"http://{store.host}")
        listener.rules = store  # type: ignore[attr-defined]
        listener.real = server  # type: ignore[attr-defined]
        listener.seen = made.requests  # type: ignore[attr-defined]
        listener.earlier = {}  # type: ignore[attr-defined]
        thread = threading.Thread(target=listener.serve_forever, daemon=True)
        thread.start()
        yield made
        listener.shutdown()
        thread.join()


class _Refusal(Exception):
    def __init__(self, status: int, code: str, message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            status, headers, content = self._answer(body)
        except _Refusal as refusal:
            text = f"<Error><Code>{refusal.code}</Code><Message>{refusal.message}</Message></Error>"
            status, headers = refusal.status, {"Content-Type": "application/xml"}
            content = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
            if self.command == "HEAD":
                content = b""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        rules: Store = self.server.rules
        seen = self._parse(rules)
        self.server.seen.append(seen)
        self._check_form(rules, seen)
        self._check_rights(rules, seen, body)
        headers = {
            name: value
            for name, value in seen.headers.items()
            if name in ("content-md5", "content-type", "range") or name.startswith("x-amz-meta-")
        }
        forbids = self._forbids_overwrite(rules, seen)
        earlier = self.server.earlier.get(seen.key) if forbids and rules.if_none_match == "lies" else None
        if earlier is not None:
            headers |= earlier
        elif forbids and rules.if_none_match != "lies":
            headers["if-none-match"] = "*"
        query = dict(seen.query)
        if seen.lists and "uploads" not in query:
            query["max-keys"] = str(min(_PAGE, int(query.get("max-keys", _PAGE))))
        if not rules.has_new_lists and query.pop("list-type", None):
            query.pop("continuation-token", None)
        status, found, content = self._ask(seen, query, headers, body)
        if earlier is not None:
            raise _Refusal(412, "PreconditionFailed")
        if seen.method == "PUT":
            self.server.earlier[seen.key] = {n: v for n, v in headers.items() if n.startswith("x-amz-meta-")}
        if status == 412 and seen.headers.get(rules.forbid_overwrite or "") == "true":
            raise _Refusal(409, rules.taken, "The object you specified already exists and can not be overwritten.")
        if status == 404 and seen.key and rules.key_prefix is not None:
            raise _Refusal(403, "AccessDenied", "without s3:ListBucket nobody learns what is absent")
        return status, found, content

    def _parse(self, rules: Store) -> Seen:
        url = urlsplit(self.path)
        host = (url.netloc or self.headers["Host"]).partition(":")[0]
        path = unquote(url.path).lstrip("/")
        if host == rules.host:
            bucket, _, key = path.partition("/")
        elif host.endswith(f".{rules.host}"):
            bucket, key = host.removesuffix(f".{rules.host}"), path
        else:
            raise _Refusal(502, "BadGateway", f"no such host: {host}")
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in self.headers.items()}
        return Seen(self.command, bucket, key, query, headers, host != rules.host, "authorization" in headers)

    def _check_form(self, rules: Store, seen: Seen) -> None:
        if rules.path_style and not seen.is_virtual:
            if rules.answers_put_by_path and seen.method == "PUT":
                raise _Refusal(404, "NoSuchKey", "The specified key does not exist.")
            raise _Refusal(403, rules.path_style, "Please use virtual hosted style to access.")
        is_streaming = seen.headers.get("x-amz-content-sha256", "").startswith("STREAMING-")
        if not rules.has_chunks and (is_streaming or "aws-chunked" in seen.headers.get("content-encoding", "")):
            raise _Refusal(400, "InvalidArgument", CHUNKED)
        if "chunked" in seen.headers.get("transfer-encoding", ""):
            raise _Refusal(411, "MissingContentLength")
        if seen.method == "POST" and "delete" in seen.query:
            raise _Refusal(501, "NotImplemented", "several objects are not removed at once here")

    def _check_rights(self, rules: Store, seen: Seen, body: bytes) -> None:
        if not seen.is_signed:
            if rules.is_public and seen.method in ("GET", "HEAD") and seen.key:
                return
            raise _Refusal(403, "AccessDenied")
        self._check_signature(seen, body)
        if rules.is_public:
            raise _Refusal(403, "InvalidAccessKeyId", "the client has no key here")
        if rules.key_prefix is not None:
            asked = seen.key or seen.query.get("prefix", "")
            if not asked.startswith(rules.key_prefix) or (seen.lists and not rules.may_list):
                raise _Refusal(403, "AccessDenied")

    def _check_signature(self, seen: Seen, body: bytes) -> None:
        """Refuse the request if its AWS4-HMAC-SHA256 signature, over the headers that it names, is wrong."""
        scheme, _, rest = seen.headers["authorization"].partition(" ")
        parts = dict(part.strip().split("=", 1) for part in rest.split(","))
        key_id, *scope = parts["Credential"].split("/")
        secret = self.server.real.environment["AWS_SECRET_ACCESS_KEY"]
        names = parts["SignedHeaders"].split(";")
        if scheme != "AWS4-HMAC-SHA256" or key_id != self.server.real.environment["AWS_ACCESS_KEY_ID"]:
            raise _Refusal(403, "InvalidAccessKeyId")
        unsigned = [name for name in seen.headers if name.startswith("x-") and name not in names]
        digest = seen.headers["x-amz-content-sha256"]
        if unsigned or digest not in ("UNSIGNED-PAYLOAD", hashlib.sha256(body).hexdigest()):
            raise _Refusal(403, "SignatureDoesNotMatch", f"not signed: {unsigned}")
        url = urlsplit(self.path)
        query = "&".join(sorted(f"{quote(n, '-_.~')}={quote(v, '-_.~')}" for n, v in seen.query.items()))
        lines = [f"{name}:{seen.headers[name].strip()}" for name in names]
        request = "\n".join([seen.method, url.path or "/", query, *lines, "", ";".join(names), digest])
        text = (
            f"{scheme}\n{seen.headers['x-amz-date']}\n{'/'.join(scope)}\n{hashlib.sha256(request.encode()).hexdigest()}"
        )
        key = f"AWS4{secret}".encode()
        for word in scope:
            key = hmac.digest(key, word.encode(), "sha256")
        if hmac.new(key, text.encode(), "sha256").hexdigest() != parts["Signature"]:
            raise _Refusal(403, "SignatureDoesNotMatch", request)

    def _forbids_overwrite(self, rules: Store, seen: Seen) -> bool:
        if seen.method != "PUT":
            return False
        if rules.forbid_overwrite and seen.headers.get(rules.forbid_overwrite) == "true":
            return True
        if "if-none-match" not in seen.headers or rules.if_none_match == "ignored":
            return False
        if rules.if_none_match == "refused":
            raise _Refusal(501, "NotImplemented", "A header you provided implies functionality that is not implemented")
        if rules.if_none_match == "inverted":
            if self._ask(Seen("HEAD", seen.bucket, seen.key, {}, {}, True, True), {}, {}, b"")[0] == 404:
                raise _Refusal(412, "PreconditionFailed")
            return False
        return True

    def _ask(
        self, seen: Seen, query: dict[str, str], headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Send the request to the real server, with that server's credentials."""
        real: S3Server = self.server.real
        environment = real.environment
        path = quote(f"/{seen.bucket}/{seen.key}" if seen.key else f"/{seen.bucket}", "/~")
        url = f"{real.endpoint_url}{path}" + (f"?{urlencode(query, quote_via=quote)}" if query else "")
        request = AWSRequest(seen.method, url, headers, body)
        credentials = Credentials(environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"])
        S3SigV4Auth(credentials, "s3", environment["AWS_DEFAULT_REGION"]).add_auth(request)
        connection = http.client.HTTPConnection(urlsplit(real.endpoint_url).netloc, timeout=60)
        try:
            connection.request(seen.method, url.removeprefix(real.endpoint_url), body, dict(request.headers.items()))
            answer = connection.getresponse()
            content = answer.read()
            kept = {n: v for n, v in answer.getheaders() if n.lower() not in ("connection", "date", "server")}
            kept = {n: v for n, v in kept.items() if n.lower() != "transfer-encoding"}
            if seen.method != "HEAD" and answer.status != 204:
                kept["Content-Length"] = str(len(content))
            return answer.status, kept, content
        finally:
            connection.close()
