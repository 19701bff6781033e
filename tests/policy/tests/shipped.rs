//! The shipped resource policy: which VM may read which resource.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use base64ct::{Base64, Encoding as _};
use proptest::prelude::*;
use ring::digest;
use secure_comms_protocol::{InitDataDigest, PodId, resource};
use secure_comms_resource_policy::{SHIPPED, allows, request};
use serde_json::{Value, json};

const TEES: [&str; 5] = ["snp", "tdx", "az-snp-vtpm", "az-tdx-vtpm", "sample"];
const INIT_DATA: &[u8] =
    b"algorithm = \"sha256\"\nversion = \"0.1.0\"\n[data]\n\"policy.rego\" = 'the pod owner'\n";
/// An init-data of an attacker, which names the pod.
const OTHER: &[u8] = b"algorithm = \"sha256\"\n[data]\n\"secure-comms.toml\" = 'pod-id = \"one\"'\n\"policy.rego\" = 'allow all'\n";

fn algorithms() -> [&'static digest::Algorithm; 3] {
    [&digest::SHA256, &digest::SHA384, &digest::SHA512]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn digest_of(algorithm: &'static digest::Algorithm, init_data: &[u8]) -> Vec<u8> {
    digest::digest(algorithm, init_data).as_ref().to_vec()
}

/// A digest cut, or zero-padded, to the size of a register.
fn register(digest: &[u8], size: usize) -> Vec<u8> {
    let mut register = digest.to_vec();
    register.resize(size, 0);
    register
}

/// PCR 8 of an Azure VM whose guest extended it with the first 32 bytes of a digest.
fn pcr08(digest: &[u8]) -> Vec<u8> {
    digest_of(&digest::SHA256, &[&[0; 32], &register(digest, 32)[..]].concat())
}

/// The body of an attestation token, as Trustee's verifiers write it.
fn evidence(tee: &str, digest: &[u8]) -> Value {
    let (own, init_data) = match tee {
        "snp" => (json!({ "evidence": { "measurement": "00" } }), hex(&register(digest, 32))),
        "tdx" => (json!({ "quote": { "body": {} } }), hex(&register(digest, 48))),
        "sample" => (json!({ "svn": "1", "debug": false }), Base64::encode_string(digest)),
        _ => (json!({ "tpm": { "pcr08": hex(&pcr08(digest)) } }), hex(&pcr08(digest))),
    };
    json!({
        "eat_profile": "tag:github.com,2024:confidential-containers/Trustee",
        "iss": "CoCo-Attestation-Service",
        "submods": { "cpu0": {
            "ear.status": "affirming",
            "ear.veraison.annotated-evidence": {
                tee: own,
                "init_data": init_data,
                "init_data_claims": { "secure-comms.toml": "pod-id = \"one\"" },
                "report_data": "00",
            },
        } },
    })
}

fn claims_of(token: &mut Value) -> &mut Value {
    &mut token["submods"]["cpu0"]["ear.veraison.annotated-evidence"]
}

fn path(pod: &str, digest: &[u8]) -> String {
    let pod: PodId = pod.parse().unwrap();
    let digest: InitDataDigest = hex(digest).parse().unwrap();
    resource::pod_keys(&pod, Some(&digest))
}

/// The shipped policy with a rule switched on.
fn with(switch: &str) -> String {
    let (off, on) = (format!("{switch} := false"), format!("{switch} := true"));
    assert_eq!(SHIPPED.matches(&off).count(), 1, "{switch}");
    SHIPPED.replace(&off, &on)
}

fn read(policy: &str, path: &str, token: &Value) -> bool {
    allows(policy, &request(path), token).unwrap()
}

/// With `sample` as good as the hardware, so that every TEE takes part in a test.
fn reads(path: &str, token: &Value) -> bool {
    read(&with("allow_sample"), path, token)
}

#[test]
fn a_vm_reads_the_keys_bound_to_its_init_data() {
    for tee in TEES {
        for algorithm in algorithms() {
            let digest = digest_of(algorithm, INIT_DATA);
            assert!(reads(&path("one", &digest), &evidence(tee, &digest)), "{tee} {algorithm:?}");
        }
    }
}

#[test]
fn an_attackers_own_init_data_opens_nothing() {
    for tee in TEES {
        for algorithm in algorithms() {
            let (honest, own) = (digest_of(algorithm, INIT_DATA), digest_of(algorithm, OTHER));
            assert!(!reads(&path("one", &honest), &evidence(tee, &own)), "{tee} {algorithm:?}");
            // What it may read is what the worker node never publishes.
            assert!(reads(&path("one", &own), &evidence(tee, &own)), "{tee} {algorithm:?}");
        }
    }
}

#[test]
fn evidence_without_init_data_opens_nothing() {
    let honest = digest_of(&digest::SHA256, INIT_DATA);
    for tee in TEES {
        for nothing in [json!(null), json!(""), json!(0), json!([]), json!({}), json!(false)] {
            let mut token = evidence(tee, &honest);
            claims_of(&mut token)["init_data"] = nothing.clone();
            assert!(!reads(&path("one", &honest), &token), "{tee} {nothing}");
        }
        let mut token = evidence(tee, &honest);
        claims_of(&mut token).as_object_mut().unwrap().remove("init_data");
        assert!(!reads(&path("one", &honest), &token), "{tee}");
    }
}

#[test]
fn registers_of_zeros_are_no_init_data() {
    let zeros = [0; 32];
    for tee in ["snp", "tdx", "sample"] {
        assert!(!reads(&path("one", &zeros), &evidence(tee, &zeros)), "{tee}");
    }
    // A PCR that no guest extended.
    for tee in ["az-snp-vtpm", "az-tdx-vtpm"] {
        let mut token = evidence(tee, &zeros);
        claims_of(&mut token)[tee]["tpm"]["pcr08"] = json!(hex(&zeros));
        claims_of(&mut token)["init_data"] = json!(hex(&zeros));
        assert!(!reads(&path("one", &zeros), &token), "{tee}");
    }
}

#[test]
fn padding_does_not_make_a_prefix_the_whole() {
    let honest = digest_of(&digest::SHA256, INIT_DATA);
    for tee in TEES {
        for kept in [0, 1, 16, 31] {
            // A register with the beginning of the digest and zeros, and the digest shifted by zeros.
            let beginning = register(&honest[..kept], 32);
            assert!(!reads(&path("one", &honest), &evidence(tee, &beginning)), "{tee} {kept}");
            let shifted = [&vec![0; 32 - kept][..], &honest[..kept]].concat();
            assert!(!reads(&path("one", &honest), &evidence(tee, &shifted)), "{tee} {kept}");
        }
    }
}

#[test]
fn a_register_has_the_size_of_its_hardware() {
    let digest = digest_of(&digest::SHA384, INIT_DATA);
    for (tee, size) in [("snp", 32), ("tdx", 48)] {
        for other in (0..=64).filter(|other| *other != size) {
            let mut token = evidence(tee, &digest);
            claims_of(&mut token)["init_data"] = json!(hex(&register(&digest, other)));
            assert!(!reads(&path("one", &digest), &token), "{tee} {other}");
        }
    }
    for other in (0..=96).filter(|other| ![32, 48, 64].contains(other)) {
        let token = evidence("sample", &register(&digest, other));
        assert!(!reads(&path("one", &digest), &token), "sample {other}");
    }
}

#[test]
fn all_32_bytes_are_compared() {
    let honest = digest_of(&digest::SHA256, INIT_DATA);
    for tee in TEES {
        for bit in [0, 7, 8, 100, 127, 128, 200, 248, 255] {
            let mut other = honest.clone();
            other[bit / 8] ^= 128 >> (bit % 8);
            assert!(!reads(&path("one", &honest), &evidence(tee, &other)), "{tee} {bit}");
        }
    }
}

#[test]
fn a_claim_in_another_form_is_refused() {
    let digest = digest_of(&digest::SHA256, INIT_DATA);
    let base64 = Base64::encode_string(&digest);
    let pcr = hex(&pcr08(&digest));
    let mut lenient = base64.clone().into_bytes();
    lenient[42] += 1;
    let forms = [
        hex(&digest).to_uppercase(),
        format!("0x{}", hex(&digest)),
        format!(" {}", hex(&digest)),
        format!("{}\n", hex(&digest)),
        format!("{}\0", hex(&digest)),
        hex(&digest)[1..].to_owned(),
        format!("{}{}", hex(&digest), "0g".repeat(16)),
        format!("{}{}", hex(&digest), "AB".repeat(16)),
        base64.trim_end_matches('=').to_owned(),
        format!("{base64}\n"),
        format!("{base64}{base64}"),
        base64.replace(['+', '/'], "-").replacen('=', "==", 1),
        // Bits after the last byte, which a lenient decoder drops.
        String::from_utf8(lenient).unwrap(),
        pcr.to_uppercase(),
        hex(&digest),
        base64,
    ];
    for tee in TEES {
        let right = claims_of(&mut evidence(tee, &digest))["init_data"].clone();
        for form in forms.iter().filter(|form| right != form.as_str()) {
            let mut token = evidence(tee, &digest);
            claims_of(&mut token)["init_data"] = json!(form);
            assert!(!reads(&path("one", &digest), &token), "{tee} {form:?}");
        }
    }
}

#[test]
fn an_azure_claim_is_the_pcr() {
    let honest = digest_of(&digest::SHA256, INIT_DATA);
    let other = digest_of(&digest::SHA256, OTHER);
    for tee in ["az-snp-vtpm", "az-tdx-vtpm"] {
        // HOST_DATA and MRCONFIGID, which the hypervisor writes and the guest does not compare.
        for claimed in
            [hex(&honest), hex(&register(&honest, 48)), Base64::encode_string(&honest), hex(&pcr08(&honest))]
        {
            let mut token = evidence(tee, &other);
            claims_of(&mut token)["init_data"] = json!(claimed);
            assert!(!reads(&path("one", &honest), &token), "{tee} {claimed}");
        }
        let mut token = evidence(tee, &honest);
        claims_of(&mut token)[tee] = json!({});
        assert!(!reads(&path("one", &honest), &token), "{tee} without PCRs");
    }
}

#[test]
fn host_data_of_azure_counts_by_a_switch() {
    let (honest, other) = (digest_of(&digest::SHA256, INIT_DATA), digest_of(&digest::SHA256, OTHER));
    let host_data = |tee, digest: &[u8]| {
        let mut token = evidence(tee, b"");
        claims_of(&mut token)["init_data"] = json!(Base64::encode_string(digest));
        token
    };
    let policy = with("allow_azure_host_data");
    assert!(!read(SHIPPED, &path("one", &honest), &host_data("az-snp-vtpm", &honest)));
    assert!(read(&policy, &path("one", &honest), &host_data("az-snp-vtpm", &honest)));
    assert!(!read(&policy, &path("one", &honest), &host_data("az-snp-vtpm", &other)));
    for tee in ["snp", "tdx", "az-tdx-vtpm"] {
        assert!(!read(&policy, &path("one", &honest), &host_data(tee, &honest)), "{tee}");
    }
}

#[test]
fn forgeable_evidence_counts_by_a_switch() {
    let digest = digest_of(&digest::SHA256, INIT_DATA);
    let token = evidence("sample", &digest);
    for path in [path("one", &digest), "default/else/what".to_owned()] {
        assert!(!read(SHIPPED, &path, &token), "{path}");
        assert!(reads(&path, &token), "{path}");
        // A device that anyone can play, in a genuine VM.
        let mut token = evidence("snp", &digest);
        token["submods"]["gpu0"] =
            json!({ "ear.status": "affirming", "ear.veraison.annotated-evidence": { "sampledevice": {} } });
        assert!(!read(SHIPPED, &path, &token), "{path}");
        assert!(reads(&path, &token), "{path}");
    }
}

#[test]
fn every_part_of_the_vm_must_be_affirmed() {
    let digest = digest_of(&digest::SHA256, INIT_DATA);
    let statuses = [
        json!("warning"),
        json!("contraindicated"),
        json!("none"),
        json!("Affirming"),
        json!(2),
        json!(null),
    ];
    for status in statuses {
        for part in ["cpu0", "gpu0"] {
            let mut token = evidence("snp", &digest);
            token["submods"]["gpu0"] =
                json!({ "ear.status": "affirming", "ear.veraison.annotated-evidence": {} });
            for path in [path("one", &digest), "default/else/what".to_owned()] {
                assert!(read(SHIPPED, &path, &token), "{path}");
                let mut token = token.clone();
                token["submods"][part]["ear.status"] = status.clone();
                assert!(!read(SHIPPED, &path, &token), "{part} {status} {path}");
            }
        }
    }
    let mut token = evidence("snp", &digest);
    token["submods"]["cpu0"].as_object_mut().unwrap().remove("ear.status");
    assert!(!read(SHIPPED, &path("one", &digest), &token));
}

#[test]
fn a_warning_counts_where_the_operator_says_so() {
    let digest = digest_of(&digest::SHA256, INIT_DATA);
    let policy = SHIPPED.replace("{\"affirming\"}", "{\"affirming\", \"warning\"}");
    let mut token = evidence("snp", &digest);
    token["submods"]["cpu0"]["ear.status"] = json!("warning");
    assert!(read(&policy, &path("one", &digest), &token));
    token["submods"]["cpu0"]["ear.status"] = json!("contraindicated");
    assert!(!read(&policy, &path("one", &digest), &token));
}

#[test]
fn a_vm_has_one_cpu_of_one_kind() {
    let digest = digest_of(&digest::SHA256, INIT_DATA);
    let path = path("one", &digest);
    let good = evidence("snp", &digest)["submods"]["cpu0"].clone();
    let bad = evidence("snp", &digest_of(&digest::SHA256, OTHER))["submods"]["cpu0"].clone();
    for submods in [
        json!({ "cpu0": bad, "cpu1": good }),
        json!({ "cpu0": good, "cpu1": bad }),
        json!({ "cpu0": good, "cpu1": good }),
        json!({ "cpu0": good, "CPU1": good }),
        json!({ "cpu1": good }),
        json!({ "CPU0": good }),
        json!({ "cpu": good }),
        json!({ "cpu0": [good] }),
        json!([good]),
        json!([]),
        json!({}),
        json!("cpu0"),
        json!(null),
    ] {
        assert!(!reads(&path, &json!({ "submods": submods })), "{submods}");
    }
    for other in TEES.iter().filter(|tee| **tee != "snp") {
        let mut token = evidence("snp", &digest);
        claims_of(&mut token)[other] = json!({});
        assert!(!reads(&path, &token), "{other}");
    }
}

#[test]
fn hardware_that_the_policy_does_not_know_reads_no_bound_keys() {
    let digest = digest_of(&digest::SHA256, INIT_DATA);
    for tee in ["se", "cca", "csv", "sgx", "tpm", "hygondcu", "SNP", "nvidia", ""] {
        let mut token = evidence("snp", &digest);
        let own = claims_of(&mut token).as_object_mut().unwrap().remove("snp").unwrap();
        claims_of(&mut token)[tee] = own;
        assert!(!reads(&path("one", &digest), &token), "{tee}");
        assert!(reads("default/else/what", &token), "{tee}");
    }
}

#[test]
fn tokens_of_another_shape_are_refused() {
    let digest = digest_of(&digest::SHA256, INIT_DATA);
    for token in [
        json!({}),
        json!(null),
        json!([]),
        json!("x"),
        json!(1),
        json!({ "tee": "snp", "init_data": hex(&digest) }),
    ] {
        for path in [path("one", &digest), "default/else/what".to_owned()] {
            assert!(!reads(&path, &token), "{path} {token}");
        }
    }
    for broken in [json!(null), json!([]), json!("x"), json!(1), json!({})] {
        let mut token = evidence("snp", &digest);
        *claims_of(&mut token) = broken.clone();
        assert!(!reads(&path("one", &digest), &token), "{broken}");
        let mut token = evidence("snp", &digest);
        claims_of(&mut token)["snp"] = json!(null);
        assert!(!reads(&path("one", &digest), &token));
    }
}

#[test]
fn a_token_that_trustee_wraps_counts_too() {
    let digest = digest_of(&digest::SHA256, INIT_DATA);
    let path = path("one", &digest);
    let wrapped = |result: Value, claims: Value| json!({ "trust_context": { "attestation_summary": { "verification_result": result, "claims": claims } } });
    for tee in TEES {
        let good = evidence(tee, &digest);
        assert!(reads(&path, &wrapped(json!(true), good.clone())), "{tee}");
        for result in [json!(false), json!(null), json!("true"), json!(1)] {
            assert!(!reads(&path, &wrapped(result, good.clone())), "{tee}");
        }
        let bad = evidence(tee, &digest_of(&digest::SHA256, OTHER));
        assert!(!reads(&path, &wrapped(json!(true), bad.clone())), "{tee}");
        // Not both.
        let mut both = wrapped(json!(true), good.clone());
        both["submods"] = bad["submods"].clone();
        assert!(!reads(&path, &both), "{tee}");
        let mut both = wrapped(json!(true), bad);
        both["submods"] = good["submods"].clone();
        assert!(!reads(&path, &both), "{tee}");
    }
}

/// The forms in which versions of Trustee hand over a path.
fn forms(path: &str) -> [Value; 3] {
    [
        request(path),
        json!({ "plugin": "resource", "resource-path": format!("/{path}"), "query": {} }),
        json!({ "resource-path": format!("resource/{path}") }),
    ]
}

#[test]
fn every_version_of_trustee_is_understood() {
    let (digest, other) = (digest_of(&digest::SHA256, INIT_DATA), digest_of(&digest::SHA256, OTHER));
    for request in forms(&path("one", &digest)) {
        assert!(allows(SHIPPED, &request, &evidence("snp", &digest)).unwrap(), "{request}");
        assert!(!allows(SHIPPED, &request, &evidence("snp", &other)).unwrap(), "{request}");
    }
    for request in forms("default/else/what") {
        assert!(allows(SHIPPED, &request, &evidence("snp", &digest)).unwrap(), "{request}");
    }
}

#[test]
fn only_the_exact_path_is_a_pods() {
    let digest = digest_of(&digest::SHA256, INIT_DATA);
    let d = hex(&digest);
    let token = evidence("snp", &digest);
    let paths = [
        format!("default/pp-one/{}", d.to_uppercase()),
        format!("default/pp-one/{d}.x"),
        format!("default/pp-one/{d}-"),
        format!("default/pp-one/{d}{d}"),
        format!("default/pp-one/{}", &d[..63]),
        format!("default/pp-one/{}", &d[..32]),
        format!("default/pp-one/{d}/"),
        format!("default/pp-one/{d}\n"),
        format!("default/pp-one/x/{d}"),
        format!("default/pp-one/../pp-one/{d}"),
        format!("default/./pp-one/{d}"),
        format!("default//pp-one/{d}"),
        format!("/default/pp-one/{d}"),
        format!("other/pp-one/{d}"),
        format!("Default/pp-one/{d}"),
        format!("default/PP-one/{d}"),
        format!("default/Pp-one/{d}"),
        format!("default/pp-/{d}"),
        format!("default/pp-.one/{d}"),
        format!("default/pp-one%2f/{d}"),
        format!("default/pp-one\n/{d}"),
        format!("default/pp-one/{d}%00"),
        format!("default/pp-one/?{d}"),
        "default/pp-one".to_owned(),
        "default/pp-one/".to_owned(),
        "default".to_owned(),
        String::new(),
        "default/pp-one/keys".to_owned(),
        "default/pp-one/Keys".to_owned(),
        "default/pp-one/privateKey".to_owned(),
        "default/pp-one/publicKey".to_owned(),
        "other/pp-one/keys".to_owned(),
        "default/else/../pp-one".to_owned(),
        "default/else".to_owned(),
        "default/else/what/more".to_owned(),
    ];
    for path in paths {
        for request in forms(&path) {
            assert!(!allows(SHIPPED, &request, &token).unwrap(), "{request}");
        }
    }
}

#[test]
fn a_path_has_64_digits_although_tdx_has_more() {
    let digest = digest_of(&digest::SHA384, INIT_DATA);
    let token = evidence("tdx", &digest);
    for length in (0..=96).filter(|length| *length != 64) {
        assert!(!reads(&format!("default/pp-one/{}", &hex(&digest)[..length]), &token), "{length}");
    }
}

#[test]
fn requests_of_another_shape_are_refused() {
    let digest = digest_of(&digest::SHA256, INIT_DATA);
    let token = evidence("snp", &digest);
    for path in [path("one", &digest), "default/else/what".to_owned()] {
        let parts: Vec<_> = path.split('/').collect();
        for request in [
            json!({}),
            json!({ "plugin": "resource" }),
            json!({ "resource-path": path }),
            json!({ "resource-path": format!("other/{path}") }),
            json!({ "resource-path": parts }),
            json!({ "plugin": "resource", "resource-path": path }),
            json!({ "plugin": "resource", "resource-path": format!("resource/{path}") }),
            json!({ "plugin": "resource", "resource-path": { "0": "default" } }),
            json!({ "plugin": "resource", "resource-path": 3 }),
            json!({ "plugin": "resource", "resource-path": [["default"], "a", "b"] }),
            json!({ "plugin": "resource", "resource-path": [1, 2, 3] }),
            json!({ "plugin": "resource", "resource-path": [path, "", ""] }),
            json!({ "plugin": "nebula-ca", "resource-path": parts }),
            json!({ "plugin": "pkcs11", "resource-path": format!("/{path}") }),
            json!({ "plugin": ["resource"], "resource-path": parts }),
        ] {
            assert!(!allows(SHIPPED, &request, &token).unwrap(), "{request}");
        }
    }
}

#[test]
fn unbound_and_old_keys_each_have_a_switch() {
    let token = evidence("snp", &digest_of(&digest::SHA256, INIT_DATA));
    let mut unproven = token.clone();
    unproven["submods"]["cpu0"]["ear.status"] = json!("warning");
    let pod: PodId = "one".parse().unwrap();
    let places = [
        ("allow_unbound", resource::pod_keys(&pod, None)),
        ("allow_old_agents", resource::separate::pod_private_key(&pod)),
    ];
    for (switch, path) in &places {
        assert!(!read(SHIPPED, path, &token), "{path}");
        for (on, _) in &places {
            assert_eq!(read(&with(on), path, &token), on == switch, "{path} with {on}");
            assert!(!read(&with(on), path, &unproven), "{path} with {on}");
            let sample = evidence("sample", &[1; 32]);
            assert!(!read(&with(on), path, &sample), "{path} with {on}");
        }
    }
    // The worker node's public key, for old agents, is no secret.
    assert!(read(SHIPPED, resource::separate::WORKER_NODE_PUBLIC_KEY, &token));
}

#[test]
fn no_switch_opens_bound_keys_to_others() {
    let (honest, other) = (digest_of(&digest::SHA256, INIT_DATA), digest_of(&digest::SHA256, OTHER));
    for switch in ["allow_unbound", "allow_old_agents", "allow_sample", "allow_azure_host_data"] {
        for tee in TEES {
            assert!(!read(&with(switch), &path("one", &honest), &evidence(tee, &other)), "{switch} {tee}");
        }
    }
}

#[test]
fn an_operators_rule_for_other_resources_can_not_open_pods() {
    let policy = SHIPPED.replace("other_resources if proven", "other_resources if true");
    assert_ne!(policy, SHIPPED);
    let (digest, other) = (digest_of(&digest::SHA256, INIT_DATA), digest_of(&digest::SHA256, OTHER));
    assert!(read(&policy, "default/else/what", &json!({})));
    for path in [path("one", &digest), "default/pp-one/keys".to_owned(), "any/PP-one/keys".to_owned()] {
        for token in [evidence("snp", &other), json!({})] {
            assert!(!read(&policy, &path, &token), "{path}");
        }
    }
}

#[test]
fn two_vms_with_the_same_init_data_are_equals() {
    // What the policy does not do: nothing in a VM's evidence says which pod it is.
    let digest = digest_of(&digest::SHA256, INIT_DATA);
    assert!(read(SHIPPED, &path("two", &digest), &evidence("snp", &digest)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn keys_are_read_if_and_only_if_the_digests_are_equal(
        tee in prop::sample::select(&TEES[..]),
        length in prop::sample::select(&[32_usize, 48, 64][..]),
        expected in prop::collection::vec(any::<u8>(), 64),
        other in prop::collection::vec(any::<u8>(), 64),
        keep in 0_usize..=64,
        pod in "[a-z0-9][a-z0-9.-]{0,40}",
    ) {
        // The two have up to `keep` bytes in common.
        let actual = [&expected[..keep], &other[keep..]].concat();
        let (expected, actual) = (&expected[..length], &actual[..length]);
        prop_assume!(expected[..32] != [0; 32]);
        let same = expected[..32] == actual[..32];
        prop_assert_eq!(reads(&path(&pod, expected), &evidence(tee, actual)), same);
    }

    #[test]
    fn no_text_in_place_of_a_claim_opens_anything(tee in prop::sample::select(&TEES[..]), claim in ".{0,100}") {
        let digest = digest_of(&digest::SHA256, INIT_DATA);
        let mut token = evidence(tee, &digest);
        claims_of(&mut token)["init_data"] = json!(claim);
        prop_assert!(!reads(&path("one", &digest), &token));
    }

    #[test]
    fn no_text_in_place_of_a_path_opens_a_pods_keys(text in "(default|Default|x)?/?(pp-|PP-|\\PC){0,3}[/.a-z]{0,5}(keys|privateKey|[0-9a-fA-F]{60,66})?") {
        let digest = digest_of(&digest::SHA256, INIT_DATA);
        for request in forms(&text) {
            let allowed = allows(SHIPPED, &request, &evidence("snp", &digest)).unwrap();
            prop_assert!(!allowed || !text.to_lowercase().contains("/pp-"), "{}", text);
        }
    }
}
