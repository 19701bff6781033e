//! The program itself, as a process on a machine of its own: a network and a mount namespace, in which the firmware's facts, the
//! addresses of the metadata services, `/run` and the console are the test's. Needs root.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy.toml lets tests fail loudly; clippy does not take the helpers of an integration test for tests"
)]

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;

use metadata::{Behaviour, Cloud, Request, Script, Server, Step, answer};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

const AZURE_TAG: &str = "7783-7084-3265-9085-8269-3286-77";
const APF: &str = r#"{"pod-network":{"podip":"10.244.0.7/24"}}"#;
const CONSOLE: &str = "/dev/console";

/// The init-data of a vector, and their digest.
fn init_data() -> (String, String) {
    let vector = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/vectors/v1-sha256-three-files");
    let read = |name| fs::read_to_string(vector.join(name)).unwrap().trim_end().to_owned();
    (read("initdata"), read("initdata.digest"))
}

/// User data as cloud-api-adaptor writes them.
fn user_data() -> String {
    let item =
        |name: &str, text: &str| format!("  - path: /run/peerpod/{name}\n    content: |\n      {text}\n");
    format!("#cloud-config\n\nwrite_files:\n{}{}", item("apf.json", APF), item("initdata", &init_data().0))
}

/// The thread's machine; gone with the thread and what it started.
struct Machine;

impl Machine {
    /// Runs `test` on a machine whose firmware says `facts`.
    fn with(facts: &[(&str, &str)], test: impl FnOnce(&Machine) + Send) {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let machine = Machine::new();
                for (name, fact) in facts {
                    fs::write(Path::new("/sys/class/dmi/id").join(name), format!("{fact}\n")).unwrap();
                }
                test(&machine);
            });
        });
    }

    fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("this test needs root");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        // A /dev with nothing but what is needed.
        mount(Some("dev"), "/media", Some("tmpfs"), MsFlags::empty(), none).unwrap();
        for name in ["null", "console"] {
            File::create(Path::new("/media").join(name)).unwrap();
        }
        mount(Some("/dev/null"), "/media/null", none, MsFlags::MS_BIND, none).unwrap();
        mount(Some("/media"), "/dev", none, MsFlags::MS_BIND | MsFlags::MS_REC, none).unwrap();
        for path in ["/media", "/run", "/sys"] {
            mount(Some("empty"), path, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        }
        fs::create_dir_all("/sys/class/dmi/id").unwrap();
        ip(&["link", "set", "lo", "up"]);
        Self
    }

    /// Starts a metadata service at `address`.
    fn serve(&self, address: &str, cloud: Cloud, behaviour: Behaviour, user_data: &str) -> Server {
        self.serve_by(address, behaviour.script(cloud, user_data.into()))
    }

    fn serve_by(&self, address: &str, script: Script) -> Server {
        // It listens before the address is there: a program that is running finds no network or the service, never an address that
        // refuses.
        fs::write("/proc/sys/net/ipv4/ip_nonlocal_bind", "1").unwrap();
        let server = Server::start(TcpListener::bind((address, 80)).unwrap(), script).unwrap();
        ip(&["address", "add", address, "dev", "lo"]);
        server
    }

    /// With 5 s there is one try, which has all of them.
    fn start(&self, seconds: &str) -> Child {
        // A program that hangs fails the test, by exit code 124.
        Command::new("timeout")
            .args(["100", env!("CARGO_BIN_EXE_process-user-data"), "provision-files", "-t", seconds])
            // Must not be asked.
            .env("http_proxy", "http://127.0.0.1:1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn run(&self, seconds: &str) -> Output {
        self.start(seconds).wait_with_output().unwrap()
    }

    fn console(&self) -> String {
        fs::read_to_string(CONSOLE).unwrap()
    }
}

fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

fn log(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The run succeeded, and the pod's files are there.
fn check_success(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "{}", log(output));
    assert_eq!(fs::read_to_string("/run/peerpod/apf.json").unwrap(), format!("{APF}\n"));
    assert_eq!(fs::read_to_string("/run/peerpod/initdata.digest").unwrap(), init_data().1);
}

/// The run failed, and no file is there.
fn check_failure(output: &Output) {
    assert_eq!(output.status.code(), Some(1), "{}", log(output));
    for name in ["apf.json", "aa.toml", "initdata", "initdata.digest"] {
        assert!(!Path::new("/run/peerpod").join(name).exists(), "{name}");
    }
}

const CLOUDS: [(&str, &str, &str, Cloud); 5] = [
    ("sys_vendor", "Amazon EC2", "169.254.169.254", Cloud::Aws { v2_only: true }),
    ("chassis_asset_tag", AZURE_TAG, "169.254.169.254", Cloud::Azure),
    ("product_name", "Google Compute Engine", "169.254.169.254", Cloud::Gcp),
    ("sys_vendor", "Alibaba Cloud", "100.100.100.200", Cloud::Alibaba),
    ("product_name", "OpenStack Nova", "169.254.169.254", Cloud::OpenStack),
];

#[test]
fn each_cloud_brings_the_files_of_its_pod() {
    for (fact, text, address, cloud) in CLOUDS {
        Machine::with(&[(fact, text)], |machine| {
            let _server = machine.serve(address, cloud, Behaviour::Correct, &user_data());
            let output = machine.run("60");
            check_success(&output);
            assert_eq!(machine.console(), "", "{cloud:?}");
        });
    }
}

#[test]
fn a_file_is_preferred_to_the_cloud() {
    Machine::with(&[("sys_vendor", "Amazon EC2")], |machine| {
        let server = machine.serve("169.254.169.254", Cloud::Aws { v2_only: true }, Behaviour::Stall, "");
        fs::create_dir("/media/cidata").unwrap();
        fs::write("/media/cidata/user-data", user_data()).unwrap();
        check_success(&machine.run("60"));
        assert_eq!(server.requests(), []);
    });
}

#[test]
fn a_network_that_comes_late_is_waited_for() {
    Machine::with(&[("sys_vendor", "Amazon EC2")], |machine| {
        let program = machine.start("60");
        // The first try has failed when the console says so.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !machine.console().contains("no connection") {
            assert!(std::time::Instant::now() < deadline, "nothing on the console");
            std::thread::yield_now();
        }
        let cloud = Cloud::Aws { v2_only: true };
        let _server = machine.serve("169.254.169.254", cloud, Behaviour::Correct, &user_data());
        check_success(&program.wait_with_output().unwrap());
        let console = machine.console();
        let expected = "process-user-data: AWS: PUT http://169.254.169.254/latest/api/token: no connection: \
                        Network is unreachable (os error 101); trying again\r\n";
        assert_eq!(console, expected);
    });
}

#[test]
fn every_fault_names_cloud_url_and_what_came() {
    let aws = "no user data from AWS in ";
    for (behaviour, expected) in [
        ("status-404", "GET http://169.254.169.254/latest/user-data: status 404, expected 200"),
        ("status-500", "GET http://169.254.169.254/latest/user-data: status 500, expected 200"),
        ("token-status-401", "PUT http://169.254.169.254/latest/api/token: status 401, expected 200"),
        ("stall", "GET http://169.254.169.254/latest/user-data: the answer is not complete in time"),
        ("drip", "GET http://169.254.169.254/latest/user-data: the answer is not complete in time"),
        (
            "garbage",
            "GET http://169.254.169.254/latest/user-data: what came is no HTTP answer: invalid HTTP version",
        ),
        (
            "cut",
            "GET http://169.254.169.254/latest/user-data: the connection was closed before the body had its Content-Length",
        ),
        (
            "redirect",
            "GET http://169.254.169.254/latest/user-data: a redirect (status 302), which is not followed",
        ),
        (
            "encoded",
            "GET http://169.254.169.254/latest/user-data: the body has a content encoding, which is refused",
        ),
        ("empty", "GET http://169.254.169.254/latest/user-data: no item in write_files"),
        ("wrong-text", "GET http://169.254.169.254/latest/user-data: line 1: "),
    ] {
        Machine::with(&[("sys_vendor", "Amazon EC2")], |machine| {
            let behaviour = Behaviour::parse(behaviour).unwrap();
            let cloud = Cloud::Aws { v2_only: true };
            let server = machine.serve("169.254.169.254", cloud, behaviour, &user_data());
            let output = machine.run("5");
            check_failure(&output);
            let console = machine.console();
            assert!(console.contains(aws) && console.contains(expected), "{console}");
            assert_eq!(console.lines().count(), 1, "{console}");
            assert!(log(&output).contains(expected));
            assert!(server.requests().len() <= 2, "a redirect was followed");
        });
    }
}

#[test]
fn wrong_base64_is_named() {
    Machine::with(&[("chassis_asset_tag", AZURE_TAG)], |machine| {
        let _server = machine.serve("169.254.169.254", Cloud::Azure, Behaviour::WrongText, "");
        check_failure(&machine.run("5"));
        assert!(machine.console().contains("the body is no base64"), "{}", machine.console());
    });
}

#[test]
fn a_session_is_given_up_only_where_there_is_none() {
    for (behaviour, is_v1_used) in
        [("token-status-403", true), ("token-status-404", true), ("token-status-500", false)]
    {
        Machine::with(&[("sys_vendor", "Amazon EC2")], |machine| {
            let behaviour = Behaviour::parse(behaviour).unwrap();
            let cloud = Cloud::Aws { v2_only: false };
            let _server = machine.serve("169.254.169.254", cloud, behaviour, &user_data());
            let output = machine.run("5");
            if is_v1_used {
                check_success(&output)
            } else {
                check_failure(&output)
            }
            assert_eq!(machine.console().contains("trying IMDSv1"), is_v1_used, "{}", machine.console());
        });
    }
}

#[test]
fn user_data_of_70_kb_are_read() {
    Machine::with(&[("sys_vendor", "Alibaba Cloud")], |machine| {
        let _server = machine.serve("100.100.100.200", Cloud::Alibaba, Behaviour::Big, &user_data());
        check_success(&machine.run("60"));
    });
}

#[test]
fn no_value_of_the_user_data_is_logged() {
    for text in [
        "#cloud-config\nSECRET: SECRET\n",
        "SECRET",
        "#cloud-config\nwrite_files:\n  - path: SECRET\n    SECRET: |\n",
    ] {
        Machine::with(&[("sys_vendor", "Alibaba Cloud")], |machine| {
            let _server = machine.serve("100.100.100.200", Cloud::Alibaba, Behaviour::Correct, text);
            let output = machine.run("5");
            check_failure(&output);
            assert!(
                !log(&output).contains("SECRET") && !machine.console().contains("SECRET"),
                "{}",
                log(&output)
            );
        });
    }
}

#[test]
fn a_machine_in_no_cloud_is_left_alone() {
    Machine::with(&[("sys_vendor", "QEMU")], |machine| {
        let output = machine.run("60");
        assert_eq!(output.status.code(), Some(0), "{}", log(&output));
        assert_eq!(machine.console(), "");
        assert!(log(&output).contains("nothing to do"), "{}", log(&output));
        let files: Vec<_> =
            fs::read_dir("/run/peerpod").unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(files, Vec::<std::ffi::OsString>::new());
    });
}

/// Azure's wire server, as far as a VM reports to it.
fn wire_server(request: &Request, _number: usize) -> Vec<Step> {
    let body = match (request.method.as_str(), request.path.as_str()) {
        ("GET", "/?comp=versions") => {
            "<Versions><Supported><Version>2015-04-05</Version></Supported></Versions>"
        }
        ("GET", "/machine/?comp=goalstate") => {
            "<GoalState><Incarnation>1</Incarnation><Container><ContainerId>c-1</ContainerId><RoleInstanceList>\
             <RoleInstance><InstanceId>i-2</InstanceId></RoleInstance></RoleInstanceList></Container></GoalState>"
        }
        ("POST", "/machine?comp=health") => "",
        _ => return vec![Step::Send(answer(404, &[], b""))],
    };
    vec![Step::Send(answer(200, &[], body.as_bytes()))]
}

#[test]
fn azure_hears_that_the_vm_is_ready() {
    Machine::with(&[], |machine| {
        let path = Path::new("/media/azure-ready");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_process-user-data"), path).unwrap();
        let server = machine.serve_by("168.63.129.16", Arc::new(wire_server));
        let output = Command::new(path).arg("-v").output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", log(&output));
        assert_eq!(machine.console(), "");
        let requests = server.requests();
        assert_eq!(requests.len(), 3, "{requests:?}");
        let report = String::from_utf8(requests[2].body.clone()).unwrap();
        for part in ["<ContainerId>c-1<", "<InstanceId>i-2<", "<State>Ready<", "<GoalStateIncarnation>1<"] {
            assert!(report.contains(part), "{part}: {report}");
        }
    });
}

#[test]
fn an_azure_that_refuses_is_named_on_the_console() {
    Machine::with(&[], |machine| {
        let refuse: Script = Arc::new(|_, _| vec![Step::Send(answer(403, &[], b""))]);
        let _server = machine.serve_by("168.63.129.16", refuse);
        let output =
            Command::new(env!("CARGO_BIN_EXE_process-user-data")).arg("azure-ready").output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", log(&output));
        let expected = "azure-ready: Azure: GET http://168.63.129.16/?comp=versions: status 403\r\n";
        assert_eq!(machine.console(), expected);
    });
}

#[test]
fn init_data_that_are_there_need_no_cloud() {
    Machine::with(&[], |machine| {
        fs::create_dir("/run/peerpod").unwrap();
        fs::write("/run/peerpod/initdata", init_data().0).unwrap();
        let output = machine.run("60");
        assert_eq!(output.status.code(), Some(1));
        assert!(machine.console().contains("no apf.json"), "{}", machine.console());
        assert!(!Path::new("/run/peerpod/initdata.digest").exists());
        fs::write("/run/peerpod/apf.json", format!("{APF}\n")).unwrap();
        check_success(&machine.run("60"));
    });
}

#[test]
fn wrong_usage_exits_with_1() {
    for args in [&["provision"][..], &[], &["provision-files", "--nope"], &["provision-files", "-t", "x"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_process-user-data")).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(log(&output).ends_with("; see --help\n"), "{}", log(&output));
    }
    for flag in ["-v", "--help"] {
        let output = Command::new(env!("CARGO_BIN_EXE_process-user-data")).arg(flag).output().unwrap();
        assert!(
            output.status.success()
                && output.stdout.starts_with(if flag == "-v" { b"process-user-data " } else { b"Usage: " })
        );
    }
}
