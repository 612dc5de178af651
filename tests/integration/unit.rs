//! The systemd unit of `rpc-server`, as `systemd-analyze` judges it. `tests/test-deb.sh` runs it.

use crate::support::programs::{bash, program_folder};
use std::fs;
use std::path::Path;

const UNIT: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../rpc-server/packaging/rpc-server@.service"
);

/// The most that `systemd-analyze security` may find exposed, in tenths; 100 is everything.
const MAX_EXPOSURE: u32 = 13;

#[test]
fn the_unit_is_valid_and_lets_a_program_do_little() {
    let unit = fs::read_to_string(UNIT).expect("the unit can be read");
    // systemd-analyze wants an instance, and a program that exists.
    let instance = Path::new(env!("CARGO_TARGET_TMPDIR")).join("rpc-server@queue.service");
    let installed = unit.replace("/usr/bin", &program_folder().display().to_string());
    assert_ne!(installed, unit, "the unit runs the installed program");
    fs::write(&instance, installed).expect("the folder is writable");
    let instance = instance.display();
    bash(&format!(
        "systemd-analyze verify --man=no --recursive-errors=no '{instance}'"
    ))
    .success()
    .stdout("")
    .stderr("");
    let security =
        format!("systemd-analyze security --no-pager --offline=true --threshold={MAX_EXPOSURE} '{instance}'");
    bash(&security).success();
}
