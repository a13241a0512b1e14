import com.google.cloud.tools.jib.api.*;
import java.nio.file.Path;

/** Jib: `SOURCE TARGET`; a target that begins with tar: is a file.  Credentials are in LOGIN and PASSWORD. */
class Jib {
    public static void main(String[] words) throws Exception {
        String target = words[1];
        Containerizer containerizer = target.startsWith("tar:")
            ? Containerizer.to(TarImage.at(Path.of(target.substring(4))).named("app"))
            : Containerizer.to(RegistryImage.named(target)
                .addCredential(System.getenv("LOGIN"), System.getenv("PASSWORD")));
        Path caches = Path.of(System.getenv("HOME"), "jib");
        JibContainer made = com.google.cloud.tools.jib.api.Jib.from(RegistryImage.named(words[0]))
            .containerize(containerizer
                .setAllowInsecureRegistries(true)
                .setBaseImageLayersCache(caches)
                .setApplicationLayersCache(caches));
        System.out.println(made.getDigest());
    }
}
