"""Object stores on this machine: what S3's and Google's clients take for the real ones."""

import functools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from lorax_gen import files


@contextmanager
def _serve_s3() -> Iterator[dict[str, str]]:
    pytest.importorskip("s3fs", reason="needs s3fs: pip install 'lorax-gen[s3]'")
    moto = pytest.importorskip("moto.server", reason="needs moto: pip install 'moto[server]'")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@contextmanager
def _serve_gs() -> Iterator[dict[str, str]]:
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # it would ask Google itself
    pytest.importorskip("gcsfs", reason="needs gcsfs: pip install 'lorax-gen[gcs]'")
    objects = pytest.importorskip(
        "gcp_storage_emulator.handlers.objects", reason="needs gcp-storage-emulator"
    )
    download = objects.download

    def with_generation(request, response, storage, *args, **kwargs):
        """Google says which generation of an object it sends; tensorstore relies on it."""
        download(request, response, storage, *args, **kwargs)
        if response.status < 300:
            name = request.params["bucket_name"], request.params["object_id"]
            response["x-goog-generation"] = storage.get_file_obj(*name)["generation"]

    objects.download = with_generation  # before the server's table is made of it
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    http = server._api._httpd
    http.handle_error = lambda *_: None  # it would tell of every client that hangs up early
    host, port = http.socket.getsockname()
    url = f"http://{host}:{port}"
    yield {
        "STORAGE_EMULATOR_HOST": url,  # for gcsfs
        "TENSORSTORE_GCS_HTTP_URL": url,  # for orbax's arrays
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
    }
    server.stop()


_servers = ExitStack()


@functools.cache
def _start_store(kind: str) -> files.AnyPath:
    """The URL of a bucket whose server is started once for the process.

    A fixture would be ended and started again whenever tests of both kinds alternate, while clients
    keep the address that they know.
    """
    settings = _servers.enter_context({"s3": _serve_s3, "gs": _serve_gs}[kind]())
    os.environ.update(settings)  # clients read it once, and nothing else uses these stores
    store = files.to_path(f"{kind}://bucket")
    files.file_system(store).mkdir("bucket")
    return store


@pytest.fixture(scope="session")
def servers():
    """Ends what was started: Python would wait for a server's thread, and never come to atexit."""
    yield
    _servers.close()


@pytest.fixture(params=["s3", "gs"], scope="session")
def bucket(request, servers):
    """The URL of a bucket in either store, for this process and those that it starts."""
    return _start_store(request.param)
