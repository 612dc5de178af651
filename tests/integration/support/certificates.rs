//! Certificates for the tests: a CA of their own, and the certificates that it signs.

use rcgen::{
    date_time_ymd, BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use std::fs;
use std::path::{Path, PathBuf};

/// A **certificate authority** (CA) that exists only for the tests.
pub(crate) struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Creates an authority that keeps its files in `folder/name`.
    pub(crate) fn new(folder: &Path, name: &str) -> Self {
        let folder = folder.join(name);
        fs::create_dir_all(&folder).expect("the folder is writable");
        let mut params = params(name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().expect("the system has random numbers");
        let root = params.self_signed(&key).expect("the key signs");
        fs::write(folder.join("ca.pem"), root.pem()).expect("the folder is writable");
        Authority {
            folder,
            issuer: Issuer::new(params, key),
        }
    }

    /// The file with the certificate of the authority.
    pub(crate) fn certificate(&self) -> String {
        self.file("ca.pem")
    }

    /// Signs a certificate for `name` that is valid for these hosts. Returns the files of the
    /// certificate and of its key.
    pub(crate) fn sign(&self, name: &str, hosts: &[&str]) -> (String, String) {
        self.sign_with(&params(name, hosts), name)
    }

    /// Like [`Authority::sign`], but the certificate expired long ago.
    pub(crate) fn sign_expired(&self, name: &str, hosts: &[&str]) -> (String, String) {
        let mut params = params(name, hosts);
        params.not_after = date_time_ymd(2001, 1, 1);
        self.sign_with(&params, name)
    }

    fn sign_with(&self, params: &CertificateParams, name: &str) -> (String, String) {
        let key = KeyPair::generate().expect("the system has random numbers");
        let certificate = params
            .signed_by(&key, &self.issuer)
            .expect("the authority signs");
        let files = (format!("{name}.pem"), format!("{name}.key"));
        fs::write(self.folder.join(&files.0), certificate.pem()).expect("the folder is writable");
        fs::write(self.folder.join(&files.1), key.serialize_pem()).expect("the folder is writable");
        (self.file(&files.0), self.file(&files.1))
    }

    fn file(&self, name: &str) -> String {
        self.folder
            .join(name)
            .to_str()
            .expect("the temporary folder is UTF-8")
            .into()
    }
}

fn params(name: &str, hosts: &[&str]) -> CertificateParams {
    let hosts = hosts
        .iter()
        .map(|&host| host.to_owned())
        .collect::<Vec<_>>();
    let mut params = CertificateParams::new(hosts).expect("they are host names");
    params.distinguished_name.push(DnType::CommonName, name);
    params
}
