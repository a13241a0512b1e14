//! oci-client as a command: `ociclient SOURCE [TARGET]` pulls, and pushes to TARGET with the credentials in
//! LOGIN and PASSWORD.

use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::manifest::{IMAGE_DOCKER_LAYER_GZIP_MEDIA_TYPE, IMAGE_LAYER_GZIP_MEDIA_TYPE};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use std::{env, error::Error};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let names: Vec<Reference> = env::args().skip(1).map(|name| name.parse()).collect::<Result<_, _>>()?;
    let client = Client::new(ClientConfig { protocol: ClientProtocol::Http, ..Default::default() });
    let accepted = vec![IMAGE_LAYER_GZIP_MEDIA_TYPE, IMAGE_DOCKER_LAYER_GZIP_MEDIA_TYPE];
    let image = client.pull(&names[0], &RegistryAuth::Anonymous, accepted).await?;
    if let Some(target) = names.get(1) {
        let login = RegistryAuth::Basic(env::var("LOGIN")?, env::var("PASSWORD")?);
        // Not with the manifest that was pulled: the layers are in the order in which they came.
        client.push(target, &image.layers, image.config, &login, None).await?;
    }
    Ok(())
}
