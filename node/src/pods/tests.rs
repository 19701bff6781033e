use secure_comms_adaptor::Config;
use secure_comms_adaptor::key_source::KeySource;
use secure_comms_adaptor::pod::PodEvent;
use secure_comms_adaptor::store::DirectoryStore;

use super::*;

/// Without Trustee, and with no keys: nothing can be prepared.
fn pods(directory: &tempfile::TempDir) -> Pods {
    let events = Events::default();
    let store = Arc::new(DirectoryStore::open(directory.path().join("store")).unwrap());
    Pods::new(Adaptor::new(store, KeySource::UserData, Config::new(events.observer())), events)
}

#[tokio::test]
async fn a_pod_that_cannot_be_prepared_leaves_no_name() {
    let directory = tempfile::tempdir().unwrap();
    let (pods, id): (_, PodId) = (pods(&directory), "no-name-is-left".parse().unwrap());
    let launch = Launch::now(Launcher::Api, Some("default/web-1".parse().unwrap()));
    let deadline = Deadline::after(std::time::Duration::from_secs(30));
    pods.prepare(&id, &launch, None, deadline).await.unwrap_err();
    assert!(names::of(&id).is_none());
}

#[test]
fn a_pod_whose_keys_are_deleted_late_leaves_no_name() {
    let id: PodId = "deleted-late".parse().unwrap();
    names::insert(&id, &"default/web-1".parse().unwrap());
    Events::default().observer()(&id, &PodEvent::Deleted);
    assert!(names::of(&id).is_none());
}

#[tokio::test]
async fn only_the_launcher_of_a_pod_learns_that_it_is_taken_away() {
    let directory = tempfile::tempdir().unwrap();
    let pods = pods(&directory);
    let mut taken_away = pods.taken_away();
    for (id, launcher) in [("of-api", Launcher::Api), ("of-caa", Launcher::Caa)] {
        let id: PodId = id.parse().unwrap();
        pods.take_away(&id);
        pods.set_obstacle(&id, &Launch::now(launcher, None), Some("it waits".to_owned()));
        pods.take_away(&id);
    }
    assert_eq!(taken_away.try_recv().unwrap().as_str(), "of-caa");
    assert!(taken_away.try_recv().is_err());
}
