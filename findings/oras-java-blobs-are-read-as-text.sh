#!/usr/bin/env bash
# Expected: `byte[] getBlob(ref)` of the ORAS SDK for Java returns the bytes of a blob, as its `fetchBlob(ref)` does.
# Actual: it reads the response as text in UTF-8, and returns the bytes of that text. Whatever is not UTF-8, such as each
#   layer that gzip has compressed, becomes other bytes. They are compared with the header `Docker-Content-Digest` alone,
#   and not with the digest of the reference: with the header it is a "Digest mismatch", without it there is no error.
#   What is UTF-8, such as a configuration, is right, and so is `fetchBlob`.
# Versions: land.oras:oras-java-sdk 0.7.0 (Maven), Java 17 or newer.
# Why a registry cache must care: with the optional header on blobs, also those that it passes on while they arrive,
#   such a client fails in place of using wrong bytes. Its message is that of a corrupt blob and names the right digest:
#   a cache should compare the stored bytes before it fetches the blob anew, which cannot help.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > pom.xml <<'POM'
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>finding</groupId>
  <artifactId>finding</artifactId>
  <version>1</version>
  <dependencies>
    <dependency>
      <groupId>land.oras</groupId>
      <artifactId>oras-java-sdk</artifactId>
      <version>0.7.0</version>
    </dependency>
  </dependencies>
</project>
POM
mvn -q -B dependency:copy-dependencies -DoutputDirectory=lib > build.log || { cat build.log; exit 1; }
cat > Finding.java <<'JAVA'
import com.sun.net.httpserver.HttpServer;
import java.io.ByteArrayOutputStream;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.util.Arrays;
import java.util.HashMap;
import java.util.HexFormat;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.zip.GZIPOutputStream;
import land.oras.ContainerRef;
import land.oras.Registry;

public class Finding {
    interface Read {
        byte[] bytes() throws Exception;
    }

    static String read(byte[] expected, Read read) throws Exception {
        try {
            return Arrays.equals(read.bytes(), expected) ? "the blob" : "other bytes";
        } catch (land.oras.exception.OrasException error) {
            return error.getMessage().split(":")[0];
        }
    }

    public static void main(String[] arguments) throws Exception {
        var compressed = new ByteArrayOutputStream();
        try (var gzip = new GZIPOutputStream(compressed)) {
            gzip.write("a layer".getBytes(StandardCharsets.UTF_8));
        }
        Map<String, byte[]> contents = new LinkedHashMap<>();
        contents.put("a configuration", "{\"os\": \"linux\", \"author\": \"é\"}".getBytes(StandardCharsets.UTF_8));
        contents.put("a layer of gzip", compressed.toByteArray());
        contents.put("the byte 0xff", new byte[] {(byte) 0xff});

        Map<String, byte[]> blobs = new HashMap<>();
        var server = HttpServer.create(new InetSocketAddress("127.0.0.1", 0), 0);
        server.createContext("/v2/", exchange -> {
            String path = exchange.getRequestURI().getPath();
            String digest = path.substring(path.lastIndexOf('/') + 1);
            byte[] blob = blobs.get(digest);
            if (path.startsWith("/v2/named/")) {
                exchange.getResponseHeaders().set("Docker-Content-Digest", digest);
            }
            exchange.getResponseHeaders().set("Content-Type", "application/octet-stream");
            if (exchange.getRequestMethod().equals("HEAD")) {
                exchange.getResponseHeaders().set("Content-Length", String.valueOf(blob.length));
                exchange.sendResponseHeaders(200, -1);
            } else {
                exchange.sendResponseHeaders(200, blob.length);
                exchange.getResponseBody().write(blob);
            }
            exchange.close();
        });
        server.start();

        var registry = Registry.builder().insecure().build();
        boolean holds = true;
        for (var each : contents.entrySet()) {
            byte[] blob = each.getValue();
            String hex = HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(blob));
            blobs.put("sha256:" + hex, blob);
            for (String repository : new String[] {"named", "unnamed"}) {
                String host = "127.0.0.1:" + server.getAddress().getPort();
                var reference = ContainerRef.parse(host + "/" + repository + "@sha256:" + hex);
                String got = read(blob, () -> registry.getBlob(reference));
                String fetched = read(blob, () -> registry.fetchBlob(reference).readAllBytes());
                String what = each.getKey() + (repository.equals("named") ? ", with the header" : ", without it");
                System.out.println("  " + what + ": getBlob: " + got + "; fetchBlob: " + fetched);
                boolean text = each.getKey().equals("a configuration");
                String wrong = repository.equals("named") ? "Digest mismatch" : "other bytes";
                holds = holds && got.equals(text ? "the blob" : wrong) && fetched.equals("the blob");
            }
        }
        System.out.println(holds ? "as stated" : "CHANGED");
        System.exit(holds ? 0 : 1);
    }
}
JAVA
echo "$(basename lib/oras-java-sdk-*.jar .jar), Java $(java -version 2>&1 | head -1 | cut -d'"' -f2)"
timeout 120 java -cp 'lib/*' Finding.java 2> errors || { cat errors; exit 1; }
