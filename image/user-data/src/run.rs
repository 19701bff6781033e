//! The program: from the cloud to the files.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::cli::ProvisionFiles;
use crate::cloud::{self, DetectError, Places};
use crate::cloud_config;
use crate::console::{Console, with_causes};
use crate::fetch::{self, Clock, Endpoints, Fetch, FetchError, Pace, Rejection};
use crate::files::{DIRECTORY, FileName, UserData};
use crate::http::BODY_LIMIT;
use crate::input;
use crate::pcr::{self, Measured, PcrError};
use crate::provision::{Directory, Earlier, FileSet, Options, Outcome, PlanError, WriteError, plan};

/// Where everything is; other places only in tests.
#[derive(Clone, Debug)]
pub struct Machine {
    /// What says which cloud it is.
    pub places: Places,
    /// Its metadata service.
    pub endpoints: Endpoints,
    /// Where the files are written.
    pub directory: PathBuf,
    /// Where init-data are measured.
    pub tpm: pcr::System,
    /// The image's own files, for those that neither user data nor init-data bring; of one name the first that is there.
    pub defaults: Vec<(FileName, PathBuf)>,
}

/// Those of our image, and those that tmpfiles.d copies in cloud-api-adaptor's: what is in the directory at the first run could be
/// the cloud's, and is replaced.
const DEFAULTS: [(FileName, &str); 5] = [
    (FileName::Auth, "/usr/lib/secure-comms/auth.json"),
    (FileName::Auth, "/etc/kata-oci/empty-auth.json"),
    (FileName::Policy, "/usr/lib/secure-comms/policy.rego"),
    (FileName::Policy, "/etc/kata-opa/default-policy.rego"),
    (FileName::Policy, "/etc/kata-opa/allow-all.rego"),
];

impl Default for Machine {
    fn default() -> Self {
        Self {
            places: Places::default(),
            endpoints: Endpoints::default(),
            directory: DIRECTORY.into(),
            tpm: pcr::System::default(),
            defaults: DEFAULTS.map(|(name, path)| (name, path.into())).into(),
        }
    }
}

/// Why `provision-files` failed. The files are the old set or none, except after a [`WriteError`] that says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The cloud remains unknown.
    #[error(transparent)]
    Detect(#[from] DetectError),
    /// No user data.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// A file of the directory that stands for user data, or one of the image, can't be read.
    #[error("reading {}", .path.display())]
    Read {
        /// Of the file.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// The init-data are wrong, or user data and init-data do not go together, or are refused by the flags.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The files could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The init-data could not be measured.
    #[error(transparent)]
    Pcr(#[from] PcrError),
}

/// Finds the cloud, fetches its user data, checks them and their init-data, measures these and puts the files in place.
///
/// # Errors
/// The first fault that time does not heal; nothing is written then.
pub fn provision_files(
    machine: &Machine,
    flags: &ProvisionFiles,
    clock: &mut impl Clock,
    console: &mut Console,
) -> Result<(), RunError> {
    let Some(cloud) = cloud::detect(&machine.places)? else {
        return without_cloud(machine, &flags.options, console);
    };
    console.note(&format!("{cloud}: this is where the user data come from"));
    let fetch =
        Fetch { cloud, endpoints: &machine.endpoints, pace: Pace::within(flags.timeout), clock, console };
    // Not locked while fetching. What a run that was killed left is settled even if there are no user data now.
    let earlier = Directory::open(&machine.directory)?.earlier()?;
    let user_data = fetch::fetch(fetch, |body| judge(body, &earlier, &flags.options))?;
    let directory = Directory::open(&machine.directory)?;
    provision(&directory, &user_data, machine, &flags.options, console)
}

/// Init-data are looked at too: they are the last large item, so a text that was cut may be cut there.
fn judge(body: &[u8], earlier: &Earlier, options: &Options) -> Result<UserData, Rejection> {
    let user_data = cloud_config::parse(body)
        .map_err(|error| Rejection { is_permanent: error.is_permanent(), cause: Box::new(error) })?;
    plan(&user_data, earlier, options)
        .map_err(|error| Rejection { is_permanent: error.is_permanent(), cause: Box::new(error) })?;
    Ok(user_data)
}

/// No cloud is known: the files that are in the directory stand for the user data.
fn without_cloud(machine: &Machine, options: &Options, console: &mut Console) -> Result<(), RunError> {
    let directory = Directory::open(&machine.directory)?;
    if directory.earlier()?.init_data.is_none() {
        console.note("this machine is in none of the known clouds, and no initdata is there: nothing to do");
        return Ok(());
    }
    let mut user_data = UserData::default();
    for name in [FileName::Apf, FileName::Auth, FileName::ScratchSpaceMarker] {
        if let Some(content) = read_if_there(&machine.directory.join(name.as_str()))? {
            user_data.files.push((name, content));
        }
    }
    provision(&directory, &user_data, machine, options, console)
}

/// Of the image, which is verified or trusted as a whole: a link is followed.
fn add_defaults(set: &mut FileSet, defaults: &[(FileName, PathBuf)]) -> Result<(), RunError> {
    for (name, path) in defaults {
        let content = match path.canonicalize() {
            Ok(path) => read_if_there(&path)?,
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(cause) => return Err(RunError::Read { path: path.clone(), cause }),
        };
        if let Some(content) = content {
            set.add_default(*name, content);
        }
    }
    Ok(())
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, RunError> {
    match input::read(path, BODY_LIMIT) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(RunError::Read { path: path.to_owned(), cause }),
    }
}

/// Everything is checked before the first file is written, and measured before the first file is in place.
fn provision(
    directory: &Directory,
    user_data: &UserData,
    machine: &Machine,
    options: &Options,
    console: &mut Console,
) -> Result<(), RunError> {
    let mut set = plan(user_data, &directory.earlier()?, options)?;
    add_defaults(&mut set, &machine.defaults)?;
    for note in set.notes() {
        console.note(&note.to_string());
    }
    let staged = directory.stage(&set)?;
    let measured = pcr::measure(&machine.tpm, set.digest(), options.require_tpm)?;
    let outcome = staged.commit()?;
    console.note(&format!(
        "{}: {}; init-data {}: {}",
        machine.directory.display(),
        match outcome {
            Outcome::Written => "the files are written",
            Outcome::Unchanged => "the files are those of an earlier run",
        },
        set.digest(),
        match measured {
            Measured::Extended => "PCR 8 is extended",
            Measured::Already => "PCR 8 was extended by an earlier run",
            Measured::NoTpm => "this VM has no TPM to extend",
        },
    ));
    Ok(())
}

/// Runs `provision-files` on this machine; false after a fault, which is on the console then.
#[must_use]
pub fn provision_this_machine(flags: &ProvisionFiles) -> bool {
    let mut console = Console::of_machine("process-user-data");
    let result = provision_files(&Machine::default(), flags, &mut fetch::Monotonic::default(), &mut console);
    match result {
        Ok(()) => true,
        Err(error) => {
            console.fatal(&with_causes(&error));
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provision::WithoutInitData;

    #[test]
    fn of_the_images_own_files_the_first_counts() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("allow-all"), "allow").unwrap();
        std::os::unix::fs::symlink("allow-all", path("default")).unwrap();
        std::fs::write(path("other"), "other").unwrap();
        let policies = ["missing", "default", "other"].map(|name| (FileName::Policy, path(name)));
        let user_data = UserData { files: vec![(FileName::Apf, b"{}".to_vec())], skipped: vec![] };
        let options = Options { without_init_data: WithoutInitData::Dummy, require_tpm: false };
        let mut set = plan(&user_data, &Earlier::default(), &options).unwrap();
        add_defaults(&mut set, &policies).unwrap();
        let policy = set.files().find(|(name, _)| *name == FileName::Policy).unwrap().1;
        assert_eq!(policy, b"allow");
    }
}
