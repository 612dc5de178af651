//! Certificates made for the tests: a CA, and what it signs.

use rcgen::{
    date_time_ymd, BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use std::fs;
use std::path::{Path, PathBuf};

/// A certificate authority of the test's own.
pub(crate) struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// An authority whose files are below this folder.
    pub(crate) fn new(folder: &Path, name: &str) -> Self {
        let folder = folder.join(name);
        fs::create_dir_all(&folder).expect("there is room for it");
        let mut params = params(name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().expect("there is randomness");
        let root = params.self_signed(&key).expect("the key signs");
        fs::write(folder.join("ca.pem"), root.pem()).expect("there is room for it");
        Authority { folder, issuer: Issuer::new(params, key) }
    }

    /// The file of its own certificate.
    pub(crate) fn certificate(&self) -> String {
        self.file("ca.pem")
    }

    /// Signs a certificate for `name`, valid for these hosts; the files of it and of its key.
    pub(crate) fn sign(&self, name: &str, hosts: &[&str]) -> (String, String) {
        self.sign_with(&params(name, hosts), name)
    }

    /// The same, of a certificate that expired long ago.
    pub(crate) fn sign_expired(&self, name: &str, hosts: &[&str]) -> (String, String) {
        let mut params = params(name, hosts);
        params.not_after = date_time_ymd(2001, 1, 1);
        self.sign_with(&params, name)
    }

    fn sign_with(&self, params: &CertificateParams, name: &str) -> (String, String) {
        let key = KeyPair::generate().expect("there is randomness");
        let certificate = params.signed_by(&key, &self.issuer).expect("the authority signs");
        let files = (format!("{name}.pem"), format!("{name}.key"));
        fs::write(self.folder.join(&files.0), certificate.pem()).expect("there is room for it");
        fs::write(self.folder.join(&files.1), key.serialize_pem()).expect("there is room for it");
        (self.file(&files.0), self.file(&files.1))
    }

    fn file(&self, name: &str) -> String {
        self.folder.join(name).to_str().expect("the temporary folder is UTF-8").into()
    }
}

fn params(name: &str, hosts: &[&str]) -> CertificateParams {
    let hosts = hosts.iter().map(|&host| host.to_owned()).collect::<Vec<_>>();
    let mut params = CertificateParams::new(hosts).expect("they are host names");
    params.distinguished_name.push(DnType::CommonName, name);
    params
}
